"""Cross-entropy of a linear head that never holds all logits.

Logits of N positions and V ids are the largest tensors of a small model by far. Here
they are made for some positions at a time, and their gradient is taken right there, in
forward: what is kept for backward is the gradient of the hidden states, [N, d], and of
the weight, [V, d]. Peak memory does not grow with N beyond that.

The gradient of the logits is that of the sum of the losses, softmax - one-hot, of order 1.
The 1/N of their mean is applied in backward, together with the gradient that comes from
above and may hold a loss scale: in float16 softmax / N would be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist import native
from ten_dist.config.model import IGNORED_TARGET
from ten_dist.model.linear import product, takes_onednn, weight_gradient
from ten_dist.model.precision import at_least_float32

LOGITS_AT_ONCE = 2**28
"""Bytes of the logits that exist at one time."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of logits hidden @ weight.T against targets.

    Products are taken in the dtype of autocast where it is on, everything else in
    float32 (float64 where `hidden` is).

    Args:
        hidden: [..., d].
        weight: [V, d].
        targets: [...] int64, IGNORED_TARGET where a position does not count.
        z_loss_weight: weight of the mean square of the log partition function, which
            keeps logits from drifting.

    Returns:
        loss: scalar, cross-entropy in nats, mean over the targets that count (0 where
            none does), and the weighted z-loss.
        z_loss: scalar, the part of `loss` that is z-loss; not differentiable.
        position_losses: [...] cross-entropy of each position in nats, 0 where it does
            not count; not differentiable.
    """
    device_type = hidden.device.type
    dtype = hidden.dtype
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    loss, z_loss, position_losses = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), z_loss_weight, dtype
    )
    return loss, z_loss, position_losses.view_as(targets)


# Elements that operators of torch pass over, one after the other, on a CPU.
_ELEMENTS_IN_CACHE = 2**20
# Positions whose gradients of the weight are added up in that dtype. float16 ends at 65504,
# which no loss scale can help here, as this sum is not scaled yet: were all of these the
# same wrong token, hidden values of 32 would still fit.
_POSITIONS_IN_A_SUM = {torch.float16: 2**11}


def _losses_then_gradient(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    z_loss_weight: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and z-loss; `logits` is overwritten by its gradient.

    Args:
        logits: [N, V]; left without meaning where no gradient is needed.
        targets: [N, 1] int64, ids.
        counted: [N] 1 for positions that count and 0 for others, float32 or wider.

    Returns:
        [N] cross-entropy, and the sum of the weighted z-losses that count. The gradient
        is that of the sum of both.
    """
    if _takes_operator(logits):
        losses, log_partition = torch.ops.ten_dist_cpu.cross_entropy_(
            logits, targets.squeeze(1), counted, z_loss_weight, need_gradient
        )
        return losses, z_loss_weight * (log_partition.square() * counted).sum()
    values = at_least_float32(logits)
    picked = values.gather(1, targets).squeeze(1)
    # Every pass over the logits counts: the sum of the exponentials serves both the log
    # partition function and the softmax.
    largest = values.amax(dim=1, keepdim=True)
    exponentials = values.sub_(largest).exp_()
    total = exponentials.sum(dim=1)
    log_partition = largest.squeeze(1) + total.log()
    z_loss = z_loss_weight * (log_partition.square() * counted).sum()
    if need_gradient:
        # d ce / d logits = softmax - one-hot; d lse^2 / d logits = 2 lse softmax.
        factor = counted * (1 + 2 * z_loss_weight * log_partition) / total
        gradient = exponentials.mul_(factor.unsqueeze(1))
        gradient.scatter_add_(1, targets, -counted.unsqueeze(1))
        if gradient.dtype != logits.dtype:
            logits.copy_(gradient)
    return log_partition - picked, z_loss


def _takes_operator(logits: Tensor) -> bool:
    """Whether the C++ operator does all of it, in the time of two copies."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and native.unavailable() is None
    )


def rows_at_once(positions: int, vocab_size: int, itemsize: int) -> int:
    """Positions whose logits, of `itemsize` bytes each, exist at one time.

    A multiple of 64 where that is possible: matrix products are fastest in whole tiles.
    """
    rows = max(1, LOGITS_AT_ONCE // (vocab_size * itemsize))
    if rows > 64:
        rows -= rows % 64
    return min(rows, positions)


def fills_up(vocab_size: int) -> int:
    """Rows that a weight of so many lacks to whole tiles of a product."""
    return -vocab_size % _TILE


def _of_whole_tiles(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[V, d] as [V', d] in `dtype`, V' the next multiple of 64, the rows added zero.

    With a vocabulary of 50257, rows of logits would start anywhere and end within a tile,
    of which products on CPUs and GPUs alike make less than of whole ones. What is added
    has logits and gradients of zero, and no part in the loss.
    """
    added = fills_up(weight.shape[0])
    if not added:
        return weight.to(dtype)
    padded = weight.new_empty(weight.shape[0] + added, weight.shape[1], dtype=dtype)
    padded[: weight.shape[0]] = weight
    padded[weight.shape[0] :] = 0
    return padded


_TILE = 64


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m]."""
    return product(a, b) if takes_onednn(a, b) else a @ b


def _logits(hidden: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """hidden [n, d] @ weight [V, d].T, in `room` [n or more, V] where the library can.

    Pieces of logits in memory of their own each would leave holes in the heap of the C
    library: an aligned block does not fit where one of its size has been.
    """
    if takes_onednn(hidden, weight):
        return product(hidden, weight.T)
    return torch.mm(hidden, weight.T, out=room[: hidden.shape[0]])


def _add_weight_gradient(total: Tensor, logits: Tensor, hidden: Tensor) -> None:
    """total [V, d] += logits [n, V].T @ hidden [n, d]."""
    if takes_onednn(logits, hidden):
        total += weight_gradient(logits, hidden)
    elif total.dtype == logits.dtype:
        torch.addmm(total, logits.T, hidden, out=total)
    else:
        _add_up(total, logits.T @ hidden)


def _add_up(total: Tensor, term: Tensor) -> None:
    """total += term, which torch first copies to the dtype of `total`: on a CPU, where that
    would be as large as the logits, some rows at a time."""
    rows = total.shape[0]
    if total.device.type == "cpu":
        rows = max(1, _ELEMENTS_IN_CACHE // total.shape[1])
    for some, of_term in zip(total.split(rows), term.split(rows)):
        some += of_term


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss_weight: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        vocab_size = weight.shape[0]
        low_weight = _of_whole_tiles(weight, dtype)
        counts = targets != IGNORED_TARGET
        state = at_least_float32(hidden.new_zeros(()))
        scale = 1.0 / counts.sum().clamp(min=1).to(state.dtype)
        z_loss = torch.zeros_like(state)
        losses_of_pieces = []
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros_like(low_weight, dtype=state.dtype) if need_weight else None
        )
        rows = rows_at_once(hidden.shape[0], vocab_size, dtype.itemsize)
        room = low_weight.new_empty(rows, low_weight.shape[0])
        counted = counts.to(state.dtype)
        targets = torch.where(counts, targets, 0).unsqueeze(1)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            low_hidden = hidden[part].to(dtype)
            logits = _logits(low_hidden, low_weight, room)
            piece_rows = rows
            if hidden.device.type == "cpu" and not _takes_operator(logits):
                piece_rows = max(1, _ELEMENTS_IN_CACHE // vocab_size)
            for piece in zip(
                logits[:, :vocab_size].split(piece_rows),
                targets[part].split(piece_rows),
                counted[part].split(piece_rows),
            ):
                losses, z_part = _losses_then_gradient(
                    *piece, z_loss_weight, need_hidden or need_weight
                )
                losses_of_pieces.append(losses)
                z_loss += z_part
            if grad_hidden is not None:
                grad_hidden[part] = _product(logits, low_weight)
            if grad_weight is not None:
                at_once = _POSITIONS_IN_A_SUM.get(dtype, rows)
                for some_logits, some_hidden in zip(
                    logits.split(at_once), low_hidden.split(at_once)
                ):
                    _add_weight_gradient(grad_weight, some_logits, some_hidden)
            # Before the next ones are made.
            del logits, piece
        del room
        z_loss *= scale
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.vocab_size, ctx.weight_dtype = vocab_size, weight.dtype
        position_losses = torch.where(counts, torch.cat(losses_of_pieces), 0)
        ctx.mark_non_differentiable(z_loss, position_losses)
        loss = (position_losses * scale).sum() + z_loss
        return loss, z_loss, position_losses

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        factor = grad_loss * scale
        # In place: a second gradient of the head would be the largest tensor of the
        # step. Going backward twice through one graph is an error from here on.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor)
        if grad_weight is not None:
            grad_weight = grad_weight[: ctx.vocab_size].mul_(factor)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None

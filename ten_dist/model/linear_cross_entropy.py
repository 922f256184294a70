"""Cross-entropy of a linear head that never holds all logits.

Logits of N positions and V ids are the largest tensors of a small model by far. Here
they are made for some positions at a time, and their gradient is taken right there, in
forward: what is kept for backward is the gradient of the hidden states, [N, d], and of
the weight, [V, d]. Peak memory does not grow with N beyond that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.config import IGNORED_TARGET
from ten_dist.model.precision import at_least_float32

LOGITS_AT_ONCE = 2**25
"""Elements of the logits that exist at one time (128 MiB in float32)."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
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
    """
    device_type = hidden.device.type
    dtype = hidden.dtype
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), z_loss_weight, dtype
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss_weight: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        low_weight = weight.to(dtype)
        counts = targets != IGNORED_TARGET
        state = at_least_float32(hidden.new_zeros(()))
        scale = 1.0 / counts.sum().clamp(min=1).to(state.dtype)
        ce_loss, z_loss = torch.zeros_like(state), torch.zeros_like(state)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros_like(weight, dtype=state.dtype) if need_weight else None
        )
        rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            low_hidden = hidden[part].to(dtype)
            logits = at_least_float32(low_hidden @ low_weight.T)
            counted = counts[part]
            wanted = torch.where(counted, targets[part], 0).unsqueeze(1)
            weights = (counted * scale).to(logits.dtype)
            log_partition = logits.logsumexp(dim=1)
            picked = logits.gather(1, wanted).squeeze(1)
            ce_loss += ((log_partition - picked) * weights).sum()
            z_loss += z_loss_weight * (log_partition.square() * weights).sum()
            if not (need_hidden or need_weight):
                continue
            # d ce / d logits = softmax - one-hot; d lse^2 / d logits = 2 lse softmax.
            softmax = logits.sub_(log_partition.unsqueeze(1)).exp_()
            factor = weights * (1 + 2 * z_loss_weight * log_partition)
            grad_logits = softmax.mul_(factor.unsqueeze(1))
            grad_logits.scatter_add_(1, wanted, -weights.unsqueeze(1))
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ low_weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ low_hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(z_loss)
        return ce_loss + z_loss, z_loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None

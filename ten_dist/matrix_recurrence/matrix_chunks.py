"""Chunks of the matrix scan in matrix products, in pure torch (docs/model.md#matrix-states).

With Theta_t the sum of the rotations since the last reset, q_t = e^(-i Theta_t) query_t and
k_t = e^(-i Theta_t) g_t key_t, the state S_t without its rotation has real decays alone. For
a chunk that the state S_0 enters, with l_t the logarithm of the decay and
D(j, t) = exp(l_(j+1) + .. + l_t) of each eigenstate,

    S_t = D(0, t) S_0 + sum_(j <= t) D(j, t) k_j v_j^T

D(j, t) is taken apart at the middle of the smallest block of 2, 4, .. steps that holds both
j and t: what lies between j and the middle belongs to k_j, what lies between the middle and
t to q_t, and the rest is a matrix product. Either is the exponential of a sum of numbers
<= 0: exact to rounding, and never too large, whatever the decays. A reset is a logarithm of
-inf, which makes exactly 0 of what crosses it; nothing is subtracted that could be -inf.

Gated linear attention (arXiv 2312.06635, section 4) has chunks of one level, whose blocks
refer to their starts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.recurrence.eigenvalues import input_gain, logit_and_rotation, to_complex

CHUNK = 32
"""Steps of a chunk, a power of two."""


class _Decays(NamedTuple):
    """Logarithms of decays, [B, H, n, C, P], of P = K/H eigenstates in blocks of some steps,
    and what the squared decays sum up to."""

    before: Tensor
    """From the start of its block up to the step: the decay of what enters the block."""
    behind: Tensor
    """After the step, up to the end of its block: the decay of what the step wrote."""
    energy: Tensor
    """[B, H, n, C, P] sum of D(t, s)^2 over the steps s >= t of the block."""
    entering_energy: Tensor
    """[B, H, n, C / block, P] the same of what enters the block."""


def scan_chunks(
    inputs: MatrixScanInputs, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_scan` from `state` [B, 2K N], all in the state dtype, for autograd.

    `resets` are there, as `starts` of the whole inputs has them.
    """
    steps, heads = inputs.key.shape[1], inputs.num_heads
    query, key, log_decay, turn = _without_rotation(inputs)
    query, key = _by_chunk(query, 2, heads), _by_chunk(key, 2, heads)
    value = _by_chunk(inputs.value, 1, heads)
    # Steps that fill the last chunk up neither decay nor count.
    exists = _by_chunk(torch.ones_like(log_decay), 1, heads)
    levels = _levels(_by_chunk(log_decay, 1, heads), exists)
    whole = levels[-1]

    scores, met = _within(query, key, value, levels[:-1])
    state = state.unflatten(-1, (2, heads, -1, inputs.state_dim))
    state = state.transpose(1, 2).flatten(2, 3)
    entering, state = _carry(key, value, whole, state)
    from_start = _twice(whole.before.exp())
    output = scores @ value + (query * from_start) @ entering
    met = met + from_start * (value @ entering.mT)
    # |S_t|^2 is D(t-1, t)^2 |S_(t-1)|^2 and what k_t v_t adds to it.
    added = key * (2 * met + key * value.square().sum(dim=-1, keepdim=True))
    energy = (whole.energy * _folded(added)).sum(dim=(2, 3))
    squares = _folded(entering.square().sum(dim=-1))
    energy = energy + (whole.entering_energy[..., 0, :] * squares).sum(dim=2)

    output = output.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)[:, :steps]
    scale = whole.before.shape[-1] ** -0.5
    real, imaginary = state.unflatten(2, (2, -1)).unbind(2)
    turned = torch.complex(real, imaginary) * turn.unflatten(-1, (heads, -1, 1))
    final = torch.stack([turned.real, turned.imag], dim=1).flatten(1)
    return scale * output, final, energy.flatten(1)


def _without_rotation(inputs: MatrixScanInputs) -> tuple[Tensor, ...]:
    """q and k [B, T, 2K], the logarithm of the decay [B, T, K], and Theta of the last step
    as a complex number of modulus 1, [B, K]."""
    of_keys = inputs.of_keys()
    logit, rotation = logit_and_rotation(of_keys)
    assert inputs.resets is not None
    resets = inputs.resets.unsqueeze(-1)
    turn = _turns(rotation.masked_fill(resets, 0.0), resets)
    key = turn.conj() * to_complex(inputs.key)
    query = turn.conj() * to_complex(inputs.query)
    if inputs.input_norm != "none":
        static = inputs.input_norm == "static"
        key = key * input_gain(inputs.alpha if static else logit)
    log_decay = functional.logsigmoid(logit).masked_fill(resets, -torch.inf)
    halves = (torch.cat([n.real, n.imag], dim=-1) for n in (query, key))
    return *halves, log_decay, turn[:, -1]


def _turns(rotation: Tensor, resets: Tensor) -> Tensor:
    """e^(i sum of the rotations [B, T, K] since the last reset [B, T, 1]), complex.

    By products, as the last bits of a long sum of angles would be lost; and each from the
    reset on, so that nothing of before it, not even a rounding, is left after it.
    """
    steps = rotation.shape[1]
    filled = functional.pad(rotation, (0, 0, 0, -steps % CHUNK))
    turn = torch.polar(torch.ones_like(filled), filled).unflatten(1, (-1, CHUNK))
    begun = functional.pad(resets, (0, 0, 0, -steps % CHUNK)).unflatten(1, (-1, CHUNK))
    turn, begun = _running_product(turn, begun)
    before, _ = _running_product(turn[:, :, -1], begun[:, :, -1])
    before = _moved(before, 1, 1).unsqueeze(2)
    return (turn * before.where(~begun, 1)).flatten(1, 2)[:, :steps]


def _running_product(factor: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
    """Product over dimension -2 up to each place since the last that has `begun` set, itself
    included, and whether there is one; `begun` has 1 for the last size of `factor`."""
    distance = 1
    while distance < factor.shape[-2]:
        factor = factor * _moved(factor, distance, 1).where(~begun, 1)
        begun = begun | _moved(begun, distance, 0)
        distance *= 2
    return factor, begun


def _moved(tensor: Tensor, distance: int, first: int) -> Tensor:
    """What is `distance` places before in dimension -2, or `first`."""
    filler = torch.full_like(tensor[..., :distance, :], first)
    return torch.cat([filler, tensor[..., :-distance, :]], dim=-2)


def _by_chunk(sequence: Tensor, halves: int, heads: int) -> Tensor:
    """[B, T, halves H P] as [B, H, n, C, halves P], with zeros after the end."""
    filled = functional.pad(sequence, (0, 0, 0, -sequence.shape[1] % CHUNK))
    parts = filled.unflatten(-1, (halves, heads, -1)).unflatten(1, (-1, CHUNK))
    return parts.permute(0, 4, 1, 2, 3, 5).flatten(4)


def _twice(of_eigenstates: Tensor) -> Tensor:
    """[..., P] for both halves, [..., 2P]."""
    return torch.cat([of_eigenstates, of_eigenstates], dim=-1)


def _folded(halves: Tensor) -> Tensor:
    """[..., 2P], the sum of both halves, [..., P]."""
    real, imaginary = halves.chunk(2, dim=-1)
    return real + imaginary


def _levels(log_decay: Tensor, exists: Tensor) -> list[_Decays]:
    """Decays in blocks of 1, 2, 4, .. C steps, from log_decay [B, H, n, C, P]."""
    squared = exists * (2 * log_decay).exp()
    levels = [_Decays(log_decay, torch.zeros_like(log_decay), exists, squared)]
    for size in _block_sizes():
        levels.append(_joined(levels[-1], size))
    return levels


def _block_sizes() -> list[int]:
    """1, 2, 4, .. C / 2."""
    return [2**level for level in range(CHUNK.bit_length() - 1)]


def _pairs(blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of [B, H, n, C, ..] the first and the second of every two blocks of `size` steps,
    [B, H, n, C / 2 size, size, ..]."""
    first, second = blocks.unflatten(3, (-1, 2, size)).unbind(4)
    return first, second


def _of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """What :func:`_pairs` made two of."""
    return torch.stack([first, second], dim=4).flatten(3, 5)


def _joined(decays: _Decays, size: int) -> _Decays:
    """Decays in blocks of twice `size` steps from those in blocks of `size`."""
    before, before_second = _pairs(decays.before, size)
    behind, behind_second = _pairs(decays.behind, size)
    energy, energy_second = _pairs(decays.energy, size)
    entering, entering_second = _pairs(decays.entering_energy, 1)
    first, second = before[..., -1:, :], before_second[..., -1:, :]
    energy = energy + (2 * behind).exp() * entering_second
    entering = entering + (2 * first).exp() * entering_second
    return _Decays(
        _of_pairs(before, before_second + first),
        _of_pairs(behind + second, behind_second),
        _of_pairs(energy, energy_second),
        entering.squeeze(4),
    )


def _within(
    query: Tensor, key: Tensor, value: Tensor, levels: list[_Decays]
) -> tuple[Tensor, Tensor]:
    """Of the steps j of a chunk for its steps t, with D = D(j, t):

    Returns:
        scores: [B, H, n, C, C], Re sum_k conj(q_t) D k_j for j <= t, else 0.
        met: [B, H, n, C, 2P], sum over j < t of D k_j (v_j . v_t).
    """
    products = value @ value.mT
    scores = (query * key).sum(dim=-1).diag_embed()
    met = torch.zeros_like(key)
    for size, decays in zip(_block_sizes(), levels):
        behind, before = _pairs(decays.behind, size)[0], _pairs(decays.before, size)[1]
        decay = _twice(_of_pairs(behind, before).exp())
        decayed = decay * key
        apart = _taken_apart(size, key.device)
        scores = scores + (decay * query) @ decayed.mT * apart
        met = met + decay * ((products * apart) @ decayed)
    return scores, met


def _taken_apart(size: int, device: torch.device) -> Tensor:
    """[C, C], 1 where t is in the second and j in the first of two blocks of `size`."""
    block = torch.arange(CHUNK, device=device) // size
    return ((block % 2 == 1).unsqueeze(1) & (block.unsqueeze(1) - 1 == block)).float()


def _carry(
    key: Tensor, value: Tensor, whole: _Decays, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What enters the chunks, [B, H, n, 2P, N], and leaves the last, [B, H, 2P, N]."""
    written = (key * _twice(whole.behind.exp())).mT @ value
    kept = _twice(whole.before[..., -1, :].exp()).unsqueeze(-1)
    entering = []
    for chunk in range(written.shape[2]):
        entering.append(state)
        state = kept[:, :, chunk] * state + written[:, :, chunk]
    return torch.stack(entering, dim=2), state

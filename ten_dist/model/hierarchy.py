"""The causal hierarchy (HTEN): one TEN at each of several scales (DESIGN 2.2).

    y_t = sum_s W_s Up_s(TEN_s(Down_s(u)))_t

Position t = js + r, 0 <= r < s, belongs to coarse step j of scale s. The coarse step
averages the s tokens that end with js, and its output is faded in over the s positions
that start at js, so nothing ever looks ahead:

    Down_s(u)[j]  = mean(u[js-s+1 .. js])                  (zeros before the start)
    Up_s(z)[js+r] = (1-w) z[j-1] + w z[j],  w = (r+1)/s

W_s and the gates act at the coarse rate, where they cost 1/s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.model.mixer import EigenstateMixer
from ten_dist.model.precision import at_least_float32


class ScaleState(NamedTuple):
    """What one scale carries from piece to piece of a sequence; O(1) in its length."""

    eigenstates: Tensor | None
    """[B, 2K/|S|] float32, or None before the first coarse step."""
    pending: Tensor
    """[B, d] float32, sum of the inputs since the last coarse step."""
    previous: Tensor
    """[B, d] output of the coarse step before the last."""
    current: Tensor
    """[B, d] output of the last coarse step."""


class HierarchyState(NamedTuple):
    """State of a :class:`HierarchicalMixer` between two pieces of a sequence."""

    position: int
    """Tokens seen so far; gives the phase of each scale."""
    scales: list[ScaleState]


class MixedScale(nn.Module):
    """One scale: TEN_s and its mixing matrix W_s, run at the coarse rate."""

    def __init__(
        self, config: TemporalEigenstateConfig, layer: int, scale: int
    ) -> None:
        super().__init__()
        self.scale = scale
        self.ten = EigenstateMixer(config, layer, step=scale)
        # Scaled so that the sum over scales starts with the variance of one scale.
        identity = torch.eye(config.dim) / len(config.scales) ** 0.5
        self.mixing = MixingMatrix(identity)

    def forward(
        self, inputs: Tensor, position: int, state: ScaleState
    ) -> tuple[Tensor, Tensor | None, ScaleState]:
        """Mix the piece `inputs` [B, T, d] that starts at `position` of the sequence.

        Returns:
            outputs: [B, T, d]; energy: scalar of the mixer, None where the piece holds
            no coarse step; the state after the piece.
        """
        scale, steps = self.scale, inputs.shape[1]
        first = -position % scale
        ticks = max(0, -(-(steps - first) // scale))
        pooled, pending = self._pool(inputs, first, ticks, state.pending)
        energy, eigenstates = None, state.eigenstates
        coarse = [state.previous.unsqueeze(1), state.current.unsqueeze(1)]
        if ticks:
            mixed, energy, eigenstates = self.ten(pooled, state.eigenstates)
            coarse.append(self.mixing(mixed))
        coarse = torch.cat([part.to(coarse[-1].dtype) for part in coarse], dim=1)
        outputs = _fade(coarse, scale)[:, scale - first : scale - first + steps]
        return (
            outputs,
            energy,
            # Copies: views would keep the whole of `coarse` alive.
            ScaleState(
                eigenstates, pending, coarse[:, -2].clone(), coarse[:, -1].clone()
            ),
        )

    def _pool(
        self, inputs: Tensor, first: int, ticks: int, pending: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Means of the windows that end in this piece, [B, ticks, d], and what is left.

        The first window ends at index `first` and began in earlier pieces.
        """
        if not ticks:
            return None, pending + at_least_float32(inputs).sum(dim=1)
        scale = self.scale
        if scale == 1:
            return inputs, pending
        whole = first + 1 + (ticks - 1) * scale
        head = pending + at_least_float32(inputs[:, : first + 1]).sum(dim=1)
        body = inputs[:, first + 1 : whole].unflatten(1, (ticks - 1, scale))
        sums = torch.cat([head.unsqueeze(1), at_least_float32(body).sum(dim=2)], dim=1)
        return sums / scale, at_least_float32(inputs[:, whole:]).sum(dim=1)


class MixingMatrix(nn.Linear):
    """W_s, without bias, started at a given matrix."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__(initial.shape[1], initial.shape[0], bias=False)
        with torch.no_grad():
            self.weight.copy_(initial)


class HierarchicalMixer(nn.Module):
    """Sum of the scales of one layer."""

    def __init__(self, config: TemporalEigenstateConfig, layer: int = 0) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            MixedScale(config, layer, scale) for scale in config.scales
        )

    def forward(
        self, inputs: Tensor, state: HierarchyState | None = None
    ) -> tuple[Tensor, Tensor, HierarchyState]:
        """Mix a sequence, or a piece of one.

        Args:
            inputs: [B, T, d], layer-normed.
            state: what the pieces before it left, or None at the start.

        Returns:
            outputs: [B, T, d].
            energy: scalar float32, sum over scales of the energies of the mixers, each
                a mean over its own coarse steps.
            state: for the piece that follows.
        """
        if state is None:
            state = self._initial_state(inputs)
        outputs, scale_states = None, []
        energy = at_least_float32(inputs.new_zeros(()))
        for scale, scale_state in zip(self.scales, state.scales):
            mixed, scale_energy, scale_state = scale(
                inputs, state.position, scale_state
            )
            outputs = mixed if outputs is None else outputs + mixed
            if scale_energy is not None:
                energy = energy + scale_energy
            scale_states.append(scale_state)
        position = state.position + inputs.shape[1]
        return outputs, energy, HierarchyState(position, scale_states)

    def _initial_state(self, inputs: Tensor) -> HierarchyState:
        zeros = at_least_float32(inputs.new_zeros(inputs.shape[0], inputs.shape[2]))
        return HierarchyState(
            0, [ScaleState(None, zeros, zeros, zeros) for _ in self.scales]
        )


def _fade(coarse: Tensor, scale: int) -> Tensor:
    """[B, J+1, d] to [B, J s, d]: from each coarse value to the next, in s steps."""
    weight = torch.arange(1, scale + 1, device=coarse.device, dtype=coarse.dtype)
    weight = (weight / scale).unsqueeze(-1)
    before, after = coarse[:, :-1].unsqueeze(2), coarse[:, 1:].unsqueeze(2)
    return torch.flatten((1 - weight) * before + weight * after, 1, 2)

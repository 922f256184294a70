"""The causal hierarchy (HTEN): one TEN at each of several scales (docs/model.md#hierarchy).

    y_t = sum_s W_s Up_s(TEN_s(Down_s(u)))_t

Position t = js + r, 0 <= r < s, belongs to coarse step j of scale s. The coarse step
averages the s tokens that end with js, and its output is faded in over the s positions
that start at js, so nothing ever looks ahead:

    Down_s(u)[j]  = mean(u[js-s+1 .. js])                  (zeros before the start)
    Up_s(z)[js+r] = (1-w) z[j-1] + w z[j],  w = (r+1)/s

W_s and the gates act at the coarse rate, where they cost 1/s.

With document masking, n(t) the number of the document of t (see `documents`), a sum has
zeros for what is of another document, as it has before the start of the row:

    Down_s(u)[j]  = (1/s) sum_i [n(i) = n(js)] u[i]        js-s+1 <= i <= js
    z             starts anew at step j where n(js) > n(js-s)
    Up_s(z)[js+r] = (1-w) [n(js-s) = n(t)] z[j-1] + w [n(js) = n(t)] z[j],  t = js+r

Steps stay at multiples of s of the row, so that what a document's outputs are depends on
where it starts, modulo the largest scale; on other documents they do not depend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.document_starts import document_numbers
from ten_dist.model.linear import linear
from ten_dist.model.matrix_mixer import make_mixer
from ten_dist.model.precision import at_least_float32
from ten_dist.model.weight_initialization import OwnValues


class ScaleState(NamedTuple):
    """What one scale carries from piece to piece of a sequence; O(1) in its length.

    With document masking, whatever is not of the document open at the end is zero.
    """

    eigenstates: Tensor | None
    """[B, 2K/|S|] float32, in matrix layers as many times state_dim; or None before the first
    coarse step."""
    pending: Tensor
    """[B, d] float32, sum of the inputs since the last coarse step."""
    previous: Tensor
    """[B, d] output of the coarse step before the last."""
    current: Tensor
    """[B, d] output of the last coarse step."""


class HierarchyState(NamedTuple):
    """State of a :class:`HierarchicalMixer` between two pieces of a sequence."""

    position: int | Tensor
    """Tokens seen so far; gives the phase of each scale. Or [B] int64 on the CPU, those of
    each row: then pieces are of one token."""
    scales: list[ScaleState]


class MixedScale(nn.Module):
    """One scale: TEN_s and its mixing matrix W_s, run at the coarse rate."""

    def __init__(
        self, config: TemporalEigenstateConfig, layer: int, scale: int
    ) -> None:
        super().__init__()
        self.scale = scale
        self.ten = make_mixer(config, layer, step=scale)
        # Scaled so that the sum over scales starts with the variance of one scale.
        identity = torch.eye(config.dim) / len(config.scales) ** 0.5
        self.mixing = MixingMatrix(identity)

    def forward(
        self,
        inputs: Tensor,
        position: int | Tensor,
        state: ScaleState,
        numbers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, ScaleState]:
        """Mix the piece `inputs` [B, T, d] that starts at `position` of the sequence.

        `numbers` [B, T] are those of the documents, where they are kept apart.

        Returns:
            outputs: [B, T, d]; energy: scalar of the mixer, None where the piece holds
            no coarse step, or rows are at positions of their own; the state after the
            piece.

        Raises:
            ValueError: rows are at positions of their own, and T is not 1.
        """
        if isinstance(position, Tensor):
            return self._one_token(inputs, position, state, numbers)
        scale, steps = self.scale, inputs.shape[1]
        first = -position % scale
        ticks = max(0, -(-(steps - first) // scale))
        pending, resets, documents = state.pending, None, None
        if numbers is not None:
            # Of the two outputs that are carried, then of the steps in this piece.
            coarse_numbers = F.pad(numbers[:, first::scale], (2, 0))
            resets = coarse_numbers[:, 2:] != coarse_numbers[:, 1:-1]
            inputs, pending = self._of_one_document(inputs, first, pending, numbers)
            documents = (numbers, coarse_numbers)
        pooled, pending = self._pool(inputs, first, ticks, pending)
        energy, eigenstates = None, state.eigenstates
        parts = [state.previous.unsqueeze(1), state.current.unsqueeze(1)]
        if ticks:
            mixed, energy, eigenstates = self.ten(pooled, eigenstates, resets)
            parts.append(self.mixing(mixed))
        coarse = torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)
        weights = _fading(scale, coarse)
        if documents is not None:
            weights = _fading_within(weights, scale - first, *documents)
        outputs = _fade(coarse, weights)[:, scale - first : scale - first + steps]
        # Copies: views would keep the whole of `coarse` alive.
        state = ScaleState(
            eigenstates, pending, coarse[:, -2].clone(), coarse[:, -1].clone()
        )
        if documents is not None:
            numbers, coarse_numbers = documents
            state = _emptied(state, coarse_numbers[:, -2:] != numbers[:, -1:])
        return outputs, energy, state

    def _one_token(
        self,
        inputs: Tensor,
        positions: Tensor,
        state: ScaleState,
        numbers: Tensor | None,
    ) -> tuple[Tensor, None, ScaleState]:
        """One token of each row, [B, 1, d], each at a position [B] of its own."""
        if inputs.shape[1] != 1:
            raise ValueError("rows at positions of their own take one token a call")
        if numbers is not None:
            starts = numbers != 0
            state = _emptied(state, starts.expand(-1, 2))
            state = state._replace(pending=state.pending.masked_fill(starts, 0.0))
        eigenstates, pending, previous, current = state
        if self.scale == 1:
            mixed, _, eigenstates = self.ten(inputs, eigenstates)
            output = self.mixing(mixed).to(current.dtype)
            state = ScaleState(eigenstates, pending, current, output.squeeze(1))
            return output, None, state
        pending = pending + at_least_float32(inputs[:, 0])
        phases = positions % self.scale
        ticking = phases == 0
        if ticking.all():
            mixed, _, eigenstates = self.ten(
                (pending / self.scale).unsqueeze(1), eigenstates
            )
            pending, previous = torch.zeros_like(pending), current
            current = self.mixing(mixed).squeeze(1).to(current.dtype)
        elif ticking.any():
            rows = ticking.nonzero().squeeze(1).to(inputs.device)
            mean = (pending[rows] / self.scale).unsqueeze(1)
            before = None if eigenstates is None else eigenstates[rows]
            mixed, _, after = self.ten(mean, before)
            output = self.mixing(mixed).squeeze(1).to(current.dtype)
            if eigenstates is None:
                eigenstates = after.new_zeros(len(pending), after.shape[1])
            eigenstates = eigenstates.index_copy(0, rows, after)
            pending = pending.index_fill(0, rows, 0.0)
            previous = previous.index_copy(0, rows, current[rows])
            current = current.index_copy(0, rows, output)
        weights = ((phases + 1) / self.scale).to(current).unsqueeze(1)
        outputs = torch.lerp(previous, current, weights)
        return (
            outputs.unsqueeze(1),
            None,
            ScaleState(eigenstates, pending, previous, current),
        )

    def _of_one_document(
        self, inputs: Tensor, first: int, pending: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`inputs` and `pending`, zero where they are of another document than the end of
        their window, or of the piece where that comes first."""
        scale, steps = self.scale, inputs.shape[1]
        if scale == 1:
            return inputs, pending
        index = torch.arange(steps, device=inputs.device)
        end = first + (index - first + scale - 1) // scale * scale
        of_end = numbers[:, end.clamp(max=steps - 1)]
        return (
            inputs.masked_fill((numbers != of_end).unsqueeze(-1), 0.0),
            pending.masked_fill(of_end[:, :1] != 0, 0.0),
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


class MixingMatrix(OwnValues, nn.Linear):
    """W_s, without bias, started at a given matrix."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__(initial.shape[1], initial.shape[0], bias=False)
        self.matrix_rows = {"weight": (self.out_features,)}
        with torch.no_grad():
            self.weight.copy_(initial)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, J, d] -> [B, J, d]."""
        return linear(inputs, self.weight)


class HierarchicalMixer(nn.Module):
    """Sum of the scales of one layer."""

    def __init__(self, config: TemporalEigenstateConfig, layer: int = 0) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            MixedScale(config, layer, scale) for scale in config.scales
        )

    def forward(
        self,
        inputs: Tensor,
        state: HierarchyState | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, HierarchyState]:
        """Mix a sequence, or a piece of one.

        Args:
            inputs: [B, T, d], layer-normed.
            state: what the pieces before it left, or None at the start.
            resets: [B, T] bool, where documents start, to keep them apart.

        Returns:
            outputs: [B, T, d].
            energy: scalar float32, sum over scales of the energies of the mixers, each
                a mean over its own coarse steps.
            state: for the piece that follows.
        """
        if state is None:
            state = self._initial_state(inputs)
        numbers = None if resets is None else document_numbers(resets)
        outputs, scale_states = None, []
        energy = at_least_float32(inputs.new_zeros(()))
        for scale, scale_state in zip(self.scales, state.scales):
            mixed, scale_energy, scale_state = scale(
                inputs, state.position, scale_state, numbers
            )
            outputs = mixed if outputs is None else outputs + mixed
            if scale_energy is not None:
                energy = energy + scale_energy
            scale_states.append(scale_state)
        assert outputs is not None, "a hierarchy has at least one scale"
        position = state.position + inputs.shape[1]
        return outputs, energy, HierarchyState(position, scale_states)

    def _initial_state(self, inputs: Tensor) -> HierarchyState:
        zeros = at_least_float32(inputs.new_zeros(inputs.shape[0], inputs.shape[2]))
        return HierarchyState(
            0, [ScaleState(None, zeros, zeros, zeros) for _ in self.scales]
        )


def _fading(scale: int, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """1 - w and w, [s, 1], of the coarse value before a position and the one after."""
    weight = torch.arange(1, scale + 1, device=coarse.device, dtype=coarse.dtype)
    weight = (weight / scale).unsqueeze(-1)
    return 1 - weight, weight


def _fading_within(
    weights: tuple[Tensor, Tensor], before: int, numbers: Tensor, coarse_numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights [s, 1] as [B, J, s, 1], zero where a coarse value is of another document
    than the position.

    Args:
        before: positions of the J s that come before those of `numbers` [B, T].
        coarse_numbers: [B, J+1], those of the coarse values.
    """
    scale = len(weights[0])
    after = (coarse_numbers.shape[1] - 1) * scale - before - numbers.shape[1]
    around = F.pad(numbers, (before, after)).unflatten(1, (-1, scale))
    sides = (coarse_numbers[:, :-1], coarse_numbers[:, 1:])
    first, second = (
        weight * (around == of.unsqueeze(2)).unsqueeze(3)
        for weight, of in zip(weights, sides)
    )
    return first, second


def _emptied(state: ScaleState, foreign: Tensor) -> ScaleState:
    """`state` without the outputs that `foreign` [B, 2] calls another document's, and
    without the eigenstates where that is so of the last."""
    of_previous, of_current = foreign[:, :1], foreign[:, 1:]
    eigenstates = state.eigenstates
    if eigenstates is not None:
        eigenstates = eigenstates.masked_fill(of_current, 0.0)
    return ScaleState(
        eigenstates,
        state.pending,
        state.previous.masked_fill(of_previous, 0.0),
        state.current.masked_fill(of_current, 0.0),
    )


def _fade(coarse: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """[B, J+1, d] to [B, J s, d]: from each coarse value to the next, in s steps, with
    weights [s, 1] or [B, J, s, 1]."""
    before, after = coarse[:, :-1].unsqueeze(2), coarse[:, 1:].unsqueeze(2)
    return torch.flatten(weights[0] * before + weights[1] * after, 1, 2)

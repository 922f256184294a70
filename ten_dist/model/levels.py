"""Levels: how much heads read of each span of the past (docs/model.md#levels).

A level l scans the same inputs with the same eigenvalues, and restarts at each multiple of
its block length B_l; the last level does not, B = infinity. Between two levels lies a span
of the past, d^l = c^l - c^(l-1) with c^0 = 0: the block of B_1 tokens that t is in, up to
t; what is before it in the block of B_2; ...; all that is before the longest block. Each
head h reads the spans with weights of its own,

    r(t)    = sum_l mu^l_h(t) d^l(t) = sum_l (mu^l_h(t) - mu^(l+1)_h(t)) c^l(t)
    mu(t)   = 2 sigmoid(W_mu u_t + b_mu)                 in R^(L H);  mu^(L+1) = 0

in place of c. W_mu and b_mu start at 0, where r = c to the bit. W_mu is a matrix that
tokens are multiplied with, as those of the selection and the gate are: with Muon it is
updated as they are, and weight decay draws mu to 1. Spans whose number grows
with the logarithm of the length, read with weights of the token, are those of log-linear
attention (Guo et al., arXiv 2506.04761); here their number is fixed.

Blocks lie at multiples of B_l of the row, also where documents are kept apart: the start of
a document restarts every level, and a document is what it is alone where it starts at a
multiple of the longest block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.linear import linear
from ten_dist.model.precision import at_least_float32
from ten_dist.recurrence import ScanInputs, eigenstate_scan_with_energy


class LevelState(NamedTuple):
    """State of :class:`Levels` between two pieces of a sequence."""

    position: int | Tensor
    """Tokens seen so far; gives where blocks end. Or [B] int64 on the CPU, those of each
    row."""
    eigenstates: tuple[Tensor, ...]
    """[B, 2K] float32 of each level."""


class Levels(nn.Module):
    """The scans of all levels, and what is read of them.

    Args:
        config: model configuration, with levels.
    """

    def __init__(self, config: TemporalEigenstateConfig) -> None:
        super().__init__()
        assert config.levels is not None, "a configuration with levels"
        self.lengths = config.levels
        self.num_heads = config.num_heads
        rows = (len(self.lengths) + 1) * self.num_heads
        self.weight = nn.Parameter(torch.zeros(rows, config.dim))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.matrix_rows = {"weight": (rows,)}

    def forward(
        self, inputs: Tensor, scan: ScanInputs, state: LevelState | None, backend: str
    ) -> tuple[Tensor, LevelState, Tensor]:
        """Scan a piece of a sequence at every level, and read the spans.

        Args:
            inputs: [B, T, d], layer-normed, for the weights mu.
            scan: that of the last level, without an initial state.
            state: what the pieces before it left, or None at the start.
            backend: of the scans.

        Returns:
            read: [B, T, 2K], r, in the dtype of the states.
            state: for the piece that follows.
            energy: [B, K], of the last level, as :func:`eigenstate_scan_with_energy`.
        """
        position, carried = (0, None) if state is None else state
        scans = [*self._restarting(scan, position), scan]
        if carried is not None:
            scans = [
                of_level._replace(initial_state=before)
                for of_level, before in zip(scans, carried)
            ]
        # All levels as one batch would hold a copy of the inputs for each.
        results = [
            eigenstate_scan_with_energy(
                of_level, backend, observable=of_level is scans[-1]
            )
            for of_level in scans
        ]
        levels, final, energies = zip(*results)
        read = self._read(levels, self._weights(inputs))
        return read, LevelState(position + inputs.shape[1], final), energies[-1]

    def _restarting(
        self, scan: ScanInputs, position: int | Tensor
    ) -> Iterator[ScanInputs]:
        """The scans of the levels that restart, of a piece that starts at `position`."""
        batch, steps, _ = scan.beta.shape
        device = scan.beta.device
        if isinstance(position, Tensor):
            position = position.to(device).unsqueeze(1)
        positions = position + torch.arange(steps, device=device)
        for length in self.lengths:
            restarts = (positions % length == 0).expand(batch, steps)
            if scan.resets is not None:
                restarts = restarts | scan.resets
            yield scan._replace(resets=restarts)

    def _weights(self, inputs: Tensor) -> Tensor:
        """mu^l - mu^(l+1) of every level and head, [B, T, L, H], at least float32."""
        logits = at_least_float32(linear(inputs, self.weight))
        logits = logits + at_least_float32(self.bias)
        mu = 2 * torch.sigmoid(logits.unflatten(-1, (-1, self.num_heads)))
        return torch.cat([mu[..., :-1, :] - mu[..., 1:, :], mu[..., -1:, :]], dim=-2)

    def _read(self, levels: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Sum over levels of their states, [B, T, 2K], by `weights` [B, T, L, H]."""
        # Of a head the weight of its real and of its imaginary parts.
        of_parts = weights.to(levels[0].dtype)[..., None, :, None]
        parts = [states.unflatten(-1, (2, self.num_heads, -1)) for states in levels]
        read = of_parts[:, :, 0] * parts[0]
        for level in range(1, len(parts)):
            read = read.addcmul_(of_parts[:, :, level], parts[level])
        return read.flatten(-3)

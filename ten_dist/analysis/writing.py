"""What each token of a text writes into the eigenstates, and what it erases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.places import Place, as_array, places_of
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.recurrence import ScanInputs
from ten_dist.recurrence.eigenvalues import eigenvalue_terms, to_complex
from ten_dist.recurrence.observer import InTurn, observed

MOVERS = 6
"""Eigenstates that are named for each token."""


@dataclasses.dataclass(frozen=True)
class Writing:
    """What the T tokens of a text do to the eigenstates of P places.

    A step of a scale s ends with a token; it belongs to the s tokens up to that one. Values
    are not-a-number where a token belongs to no step.
    """

    tokens: np.ndarray
    """[T] int64."""
    written: np.ndarray
    """[P, T] float32, ||g beta||: the length of what a step writes."""
    erased: np.ndarray
    """[P, T] float32, share of the energy before a step that decay or a reset removes, 0 to
    1; of a first step, before which there is none, not-a-number."""
    movers: np.ndarray
    """[T, 6, 2] int64: place and eigenstate of those that a step ending here moves most,
    first the one that moves most; -1 where there are fewer."""
    changes: np.ndarray
    """[T, 6] float32, |c(t) - c(t-1)| of these."""


@torch.no_grad()
def measure_writing(
    network: TemporalEigenstateNetwork, tokens: Sequence[int]
) -> Writing:
    """Run a network over a text of at least one token."""
    places = places_of(network)
    seen = [_Steps(place) for place in places]
    row = torch.tensor([list(tokens)], device=network.embedding.weight.device)
    with observed(InTurn(seen)):
        network(row, last_only=True)
    count = row.shape[1]
    movers, changes = _largest(seen, count)
    return Writing(
        tokens=as_array(row[0]),
        written=np.stack([steps.over_tokens(steps.written, count) for steps in seen]),
        erased=np.stack([steps.over_tokens(steps.erased, count) for steps in seen]),
        movers=movers,
        changes=changes,
    )


class _Steps:
    """An observer of one scan, of one row of J steps, with all its columns."""

    def __init__(self, place: Place) -> None:
        self.scale = place.scale
        # [J]: squared lengths of what is written, of what was held before, of what is kept.
        self._written, self._held, self._kept = (torch.zeros(()) for _ in range(3))
        # [J, K]
        self._moved = torch.zeros(())

    def see(self, inputs: ScanInputs, states: Tensor, column: int = 0) -> None:
        inputs = inputs.in_state_dtype()
        terms = eigenvalue_terms(inputs)
        beta = to_complex(inputs.beta[0])
        if terms.gain is not None:
            beta = beta * terms.gain[0]
        now = to_complex(states[0].to(inputs.beta.dtype))
        before = torch.cat([torch.zeros_like(now[:1]), now[:-1]])
        kept = (terms.decay[0] * before.abs()).square().sum(dim=-1)
        if inputs.resets is not None:
            kept = kept.masked_fill(inputs.resets[0], 0.0)
        self._kept = self._kept + kept
        self._held = self._held + before.abs().square().sum(dim=-1)
        self._written = self._written + beta.abs().square().sum(dim=-1)
        self._moved = self._moved + (now - before).abs().square()

    @property
    def written(self) -> np.ndarray:
        """[J], as in :class:`Writing`."""
        return as_array(self._written.sqrt())

    @property
    def erased(self) -> np.ndarray:
        """[J], as in :class:`Writing`: of nothing nothing can be erased, 0 / 0 is
        not-a-number."""
        return as_array(1 - self._kept / self._held)

    @property
    def moved(self) -> np.ndarray:
        """[J, K], |c(t) - c(t-1)|."""
        return as_array(self._moved.sqrt())

    def over_tokens(self, values: np.ndarray, count: int) -> np.ndarray:
        """[T] of [J]: step j belongs to tokens js - s + 1 to js."""
        steps = -(-np.arange(count) // self.scale)
        padded = np.append(values.astype(np.float32), np.nan)
        return padded[np.minimum(steps, values.size)]


def _largest(seen: list[_Steps], count: int) -> tuple[np.ndarray, np.ndarray]:
    movers = np.full((count, MOVERS, 2), -1, dtype=np.int64)
    changes = np.zeros((count, MOVERS), dtype=np.float32)
    moved = [steps.moved for steps in seen]
    for token in range(count):
        found = [
            (float(moved[place][token // steps.scale, k]), place, int(k))
            for place, steps in enumerate(seen)
            if token % steps.scale == 0
            for k in np.argsort(-moved[place][token // steps.scale])[:MOVERS]
        ]
        for rank, (change, place, k) in enumerate(sorted(found, reverse=True)[:MOVERS]):
            movers[token, rank] = place, k
            changes[token, rank] = change
    return movers, changes

"""What the eigenstates do on real tokens, in histograms: memory is bounded."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.places import Place, as_array, places_of
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.eigenstate_module import EigenstateModule
from ten_dist.model.linear import linear
from ten_dist.recurrence import ScanInputs
from ten_dist.recurrence.bound import EnergyBound
from ten_dist.recurrence.eigenvalues import eigenvalue_terms, state_energy
from ten_dist.recurrence.observer import InTurn, observed

_BINS = 256
_LONGEST = math.log(1e7)
MEMORY_EDGES = np.exp(np.linspace(0, _LONGEST, _BINS + 1))
"""[257] edges of the histograms of memory, in steps; the last bin has all above, too."""
PLANE_SIDE = 64
"""Cells along each side of the histograms of eigenvalues, which are of the square from
-1 - i to 1 + i."""
PERCENTILES = (5, 50, 95)
"""Of memory, that figures show."""
AT_LIMIT = 0.99
"""Size of tanh from which the selection counts as at its limit."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What was seen of the K eigenstates of a place over all rows and steps."""

    scale: int
    """Tokens a step."""
    memory_counts: np.ndarray
    """[K, 256] int64, steps by the memory 1 / (1 - rho_k(t)), see `MEMORY_EDGES`."""
    plane_counts: np.ndarray
    """[64, 64] int64, steps and eigenstates by the effective eigenvalue lambda_k(t); the
    first index is the imaginary part."""
    energy: np.ndarray
    """[K] float64, mean of |c_k|^2; of one that carries a vector, mean over its entries."""
    bound: EnergyBound
    decay_at_limit: float
    """Share of eigenstates and steps whose decay is selected as far as it can be."""
    rotation_at_limit: float
    """The same of the rotation."""
    lowest_gate: np.ndarray
    """[G] float32, least value of each gate, a sigmoid, over the steps."""
    highest_gate: np.ndarray
    """[G] float32, largest value."""

    def memory_percentiles(self, percentiles: Sequence[float]) -> np.ndarray:
        """[K, P] memory as used, in tokens: percentiles over the steps, to within 4 %."""
        rows = [_percentiles(counts, percentiles) for counts in self.memory_counts]
        return self.scale * np.stack(rows)

    def memory_of_all(self, percentiles: Sequence[float]) -> np.ndarray:
        """[P], the same over the steps of all eigenstates together."""
        return self.scale * _percentiles(self.memory_counts.sum(axis=0), percentiles)


def _percentiles(counts: np.ndarray, percentiles: Sequence[float]) -> np.ndarray:
    """Geometric centres of the bins in which the percentiles lie, in steps."""
    cumulated = np.cumsum(counts)
    wanted = np.asarray(percentiles) / 100 * cumulated[-1]
    bins = np.minimum(np.searchsorted(cumulated, wanted), _BINS - 1)
    return np.sqrt(MEMORY_EDGES[bins] * MEMORY_EDGES[bins + 1])


@torch.no_grad()
def observe_usage(network: TemporalEigenstateNetwork, rows: HeldOutRows) -> list[Usage]:
    """Run a network on some rows and watch its eigenstates.

    Returns:
        One for each place, in the order of :func:`places_of`.
    """
    places = places_of(network)
    counters = [UsageCounter(place) for place in places]
    with contextlib.ExitStack() as stack:
        for counter in counters:
            stack.callback(counter.watch_gates().remove)
        for batch in rows.batches():
            with observed(InTurn(counters)):
                # Logits of one position: they are of no interest here.
                network(batch.inputs, last_only=True)
    return [counter.usage() for counter in counters]


class UsageCounter:
    """An observer of the scans of one place, which counts over all that it sees."""

    def __init__(self, place: Place) -> None:
        mixer = place.mixer
        self._place, self._device = place, mixer.alpha_base.device
        width, gates = mixer.num_eigenstates, len(mixer.gate_bias)
        self._memory = self._zeros(width * _BINS)
        self._plane = self._zeros(PLANE_SIDE**2)
        self._energy = torch.zeros(width, dtype=torch.float64, device=self._device)
        self._steps = 0
        self._numbers = 0
        self._bound = EnergyBound()
        self._at_limit = self._zeros(2)
        self._lowest = torch.full((gates,), math.inf, device=self._device)
        self._highest = -self._lowest

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)

    def watch_gates(self) -> RemovableHandle:
        """See every call of the mixer, too."""
        return self._place.mixer.register_forward_hook(self._see_gates)

    def _see_gates(
        self, mixer: EigenstateModule, arguments: tuple[Any, ...], _results: Any
    ) -> None:
        weight = mixer.input_weight[mixer.rows_of("gate")]
        gates = torch.sigmoid(linear(arguments[0], weight, mixer.gate_bias))
        self._lowest = torch.minimum(self._lowest, gates.amin(dim=(0, 1)))
        self._highest = torch.maximum(self._highest, gates.amax(dim=(0, 1)))

    @torch.no_grad()
    def see(self, inputs: ScanInputs, states: Tensor, column: int = 0) -> None:
        """Take in a scan, as every observer does."""
        self._bound.see(inputs, states, column)
        self._energy += state_energy(states).sum(dim=0)
        steps = states.shape[0] * states.shape[1]
        self._numbers += steps
        if column > 0:
            # All entries of a vector have the same eigenvalues.
            return
        self._steps += steps
        terms = eigenvalue_terms(inputs.in_state_dtype())
        # log(1 + e^logit) is the logarithm of the memory.
        bins = (F.softplus(terms.logit) * (_BINS / _LONGEST)).long()
        eigenstates = torch.arange(bins.shape[-1], device=self._device)
        index = bins.clamp_(max=_BINS - 1) + _BINS * eigenstates
        self._memory += _counted(index, self._memory)
        plane = torch.view_as_real(terms.eigenvalue)
        cells = ((plane + 1) * (PLANE_SIDE / 2)).long().clamp_(0, PLANE_SIDE - 1)
        self._plane += _counted(cells[..., 1] * PLANE_SIDE + cells[..., 0], self._plane)
        assert inputs.modulation is not None, "every mixer selects"
        at_limit = torch.tanh(inputs.modulation).abs() >= AT_LIMIT
        self._at_limit += at_limit.unflatten(-1, (2, -1)).sum(dim=(0, 1, 3))

    def usage(self) -> Usage:
        """What was counted; of gates nothing, unless they were watched."""
        width = len(self._energy)
        decay, rotation = (self._at_limit / (self._steps * width)).tolist()
        return Usage(
            scale=self._place.scale,
            memory_counts=as_array(self._memory).reshape(width, _BINS),
            plane_counts=as_array(self._plane).reshape(PLANE_SIDE, PLANE_SIDE),
            energy=as_array(self._energy / self._numbers),
            bound=self._bound,
            decay_at_limit=decay,
            rotation_at_limit=rotation,
            lowest_gate=as_array(self._lowest),
            highest_gate=as_array(self._highest),
        )


def _counted(index: Tensor, counts: Tensor) -> Tensor:
    return torch.bincount(index.flatten(), minlength=len(counts))

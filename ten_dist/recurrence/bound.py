"""The bound on the energy of a scan: a check on running code, not a quantity of training.

Theorem 4 of the paper (docs/model.md#energy-bound): with |lambda| <= 1 and ||g beta|| <= B at every step,
sqrt(E(t)) <= sqrt(E(0)) + t B, where E(t) = sum_k |c_k(t)|^2. A scan that breaks it has
not computed the recurrence.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ten_dist.recurrence.eigenvalues import eigenvalue_terms
from ten_dist.recurrence.inputs import ScanInputs


@dataclasses.dataclass
class EnergyBound:
    """An observer of scans (:mod:`ten_dist.recurrence.observer`): of those of all layers and
    scales, the one that is nearest to the bound."""

    largest_ratio: float = 0.0
    """Of sqrt(E(t)) to its bound; at most 1 but for rounding."""
    eigenvalue_distance: float = 1.0
    """Least of 1 - |lambda|: 1 over the longest memory, in tokens."""

    @torch.no_grad()
    def see(self, inputs: ScanInputs, states: Tensor, column: int = 0) -> None:
        """Take in a scan, as every :class:`ScanObserver` does."""
        inputs = inputs.in_state_dtype()
        terms = eigenvalue_terms(inputs)
        beta = inputs.beta
        steps = torch.arange(1, beta.shape[1] + 1, device=beta.device, dtype=beta.dtype)
        beta = beta.unflatten(-1, (2, -1))
        if terms.gain is not None:
            beta = beta * terms.gain.unsqueeze(-2)
        bound = steps * beta.flatten(-2).norm(dim=-1).amax(dim=1, keepdim=True)
        if inputs.initial_state is not None:
            bound = bound + inputs.initial_state.norm(dim=-1, keepdim=True)
        norms = states.to(steps.dtype).norm(dim=-1)
        # Where nothing came in, nothing may come out.
        ratio = torch.where(norms == 0, 0.0, norms / bound).max().item()
        # A value that is no number must not be lost in a comparison.
        if not ratio <= self.largest_ratio:
            self.largest_ratio = ratio
        distance = torch.sigmoid(-terms.logit).min().item()
        if not distance >= self.eigenvalue_distance:
            self.eigenvalue_distance = distance

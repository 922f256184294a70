"""The oracle: the recurrence as it is written, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.recurrence.eigenvalues import (
    eigenvalue_terms,
    state_dtype,
    state_energy,
    to_complex,
    to_halves,
)


def reference_scan(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` as a loop over T that autograd differentiates.

    Every other backend is checked against it, in float64. It keeps O(T) tensors for
    backward and takes T Python steps: for tests, not for training.
    """
    dtype = state_dtype(beta)
    terms = eigenvalue_terms(
        alpha.to(dtype),
        omega.to(dtype),
        None if modulation is None else modulation.to(dtype),
        ranges.to(dtype),
        input_norm,
    )
    drive = to_complex(beta.to(dtype))
    if terms.gain is not None:
        drive = terms.gain * drive
    eigenvalue = terms.eigenvalue.expand_as(drive)
    if initial_state is None:
        state = torch.zeros_like(drive[:, 0])
    else:
        state = to_complex(initial_state.to(dtype))
    states = []
    for step in range(drive.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, step, None], 0.0)
        state = eigenvalue[:, step] * state + drive[:, step]
        states.append(state)
    states = to_halves(torch.stack(states, dim=1))
    return states.to(beta.dtype), to_halves(state), state_energy(states)

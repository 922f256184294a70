"""The oracle: the recurrence as it is written, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.recurrence.eigenvalues import (
    eigenvalue_terms,
    entering_state,
    state_energy,
    to_complex,
    to_halves,
)
from ten_dist.recurrence.inputs import ScanInputs


def reference_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` as a loop over T that autograd differentiates, with the energy.

    Every other backend is checked against it, in float64. It keeps O(T) tensors for
    backward and takes T Python steps: for tests, not for training.
    """
    dtype, inputs = inputs.beta.dtype, inputs.in_state_dtype()
    terms = eigenvalue_terms(inputs)
    drive = to_complex(inputs.beta)
    if terms.gain is not None:
        drive = terms.gain * drive
    eigenvalue = terms.eigenvalue.expand_as(drive)
    state = entering_state(inputs)
    steps = []
    for step in range(drive.shape[1]):
        if inputs.resets is not None:
            state = state.masked_fill(inputs.resets[:, step, None], 0.0)
        state = eigenvalue[:, step] * state + drive[:, step]
        steps.append(state)
    states = to_halves(torch.stack(steps, dim=1))
    return states.to(dtype), to_halves(state), state_energy(states)

"""The oracle of the matrix scan: the recurrence as it is written, step after step."""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.matrix_recurrence.matrix_inputs import (
    MatrixScanInputs,
    entering_matrices,
    leaving_matrices,
    matrix_to_complex,
)
from ten_dist.recurrence.eigenvalues import eigenvalue_terms


def reference_matrix_scan(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_scan` as a loop over T that autograd differentiates.

    Every other backend is checked against it, in float64. It keeps every state for
    backward: for tests, not for training.
    """
    dtype, inputs = inputs.key.dtype, inputs.in_state_dtype()
    heads = inputs.num_heads
    terms = eigenvalue_terms(inputs.of_keys())
    eigenvalue = terms.eigenvalue.unflatten(-1, (heads, -1))
    key = matrix_to_complex(inputs.key, heads)
    if terms.gain is not None:
        key = key * terms.gain.unflatten(-1, (heads, -1))
    query = matrix_to_complex(inputs.query, heads)
    value = inputs.value.unflatten(-1, (heads, -1))
    scale = key.shape[-1] ** -0.5
    state = entering_matrices(inputs)
    outputs, energy = [], 0.0
    for step in range(key.shape[1]):
        if inputs.resets is not None:
            dropped = inputs.resets[:, step, None, None, None]
            state = state.masked_fill(dropped, 0.0)
        written = key[:, step].unsqueeze(-1) * value[:, step].unsqueeze(-2)
        state = eigenvalue[:, step].unsqueeze(-1) * state + written
        read = (query[:, step].conj().unsqueeze(-1) * state).real.sum(dim=-2)
        outputs.append(scale * read.flatten(1))
        energy = energy + (state.real**2 + state.imag**2).sum(dim=-1).flatten(1)
    assert isinstance(energy, Tensor)
    stacked = torch.stack(outputs, dim=1).to(dtype)
    return stacked, leaving_matrices(state), energy

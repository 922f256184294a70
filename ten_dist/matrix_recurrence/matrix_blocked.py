"""The matrix scan in pure torch, piece after piece (docs/model.md#matrix-states)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ten_dist.matrix_recurrence.matrix_chunks import CHUNK, scan_chunks
from ten_dist.matrix_recurrence.matrix_finite import with_not_a_number
from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.recurrence.inputs import state_dtype

PIECE = 16 * CHUNK
"""Steps whose chunks are computed at once, and in backward once more."""


def blocked_matrix_scan(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_scan` on any device that runs torch.

    Kept for backward: the arguments, and the 2K N numbers that enter each PIECE steps. What
    a piece takes besides is computed again, for one piece at a time.
    """
    dtype, state = state_dtype(inputs.key), inputs.initial_state
    if state is None:
        size = inputs.key.shape[-1] * inputs.state_dim
        state = inputs.key.new_zeros(len(inputs.key), size)
    state = _finite(state.to(dtype))
    sequences = (inputs.key, inputs.query, inputs.value, inputs.modulation)
    pieces = zip(*(s.split(PIECE, dim=1) for s in (*sequences, inputs.starts())))
    outputs, energies = [], []
    for key, query, value, modulation, resets in pieces:
        piece = inputs._replace(
            key=key, query=query, value=value, modulation=modulation, resets=resets
        )
        output, state, energy = checkpoint(
            _scan_piece, piece, state, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(output)
        energies.append(energy)
    output, energy = torch.cat(outputs, dim=1), torch.stack(energies).sum(dim=0)
    return with_not_a_number(inputs, output, state, energy)


def _scan_piece(
    piece: MatrixScanInputs, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, piece = piece.key.dtype, piece.in_state_dtype()
    # What is not finite is read as 0, see `matrix_finite`.
    finite = piece._replace(
        key=_finite(piece.key),
        query=_finite(piece.query),
        value=_finite(piece.value),
        modulation=_finite(piece.modulation),
    )
    output, state, energy = scan_chunks(finite, state)
    return output.to(dtype), state, energy


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)

"""The matrix scan as a C++ operator for CPUs (`ten_dist/native/matrix_scan.cpp`).

As a registered operator with a fake implementation it does not break a graph under
`torch.compile`.

Memory for backward: the arguments, and a state in every `_CHUNK` steps, which are 2 K N /
`_CHUNK` floats a step. The states between them are computed again.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ten_dist import native
from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.recurrence.inputs import unit_stride

# Of the C++ operator, which keeps no state before the first chunk.
_CHUNK = 64


def cpu_matrix_scan(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_scan` for float32, bfloat16 and float16 on the CPU.

    The operator is the one that :func:`unavailable` has loaded. It has no float16, which
    trains on GPUs: such inputs are converted to float32, in memory of their own, and the
    outputs back.
    """
    if inputs.key.dtype == torch.float16:
        names = "key", "query", "value", "modulation"
        wide = {name: getattr(inputs, name).float() for name in names}
        outputs, final_state, energy = cpu_matrix_scan(inputs._replace(**wide))
        return outputs.to(torch.float16), final_state, energy
    initial_state, resets = inputs.initial_state, inputs.resets
    outputs, final_state, energy, _ = torch.ops.ten_dist_cpu.matrix_scan_forward(
        unit_stride(inputs.key),
        unit_stride(inputs.query),
        unit_stride(inputs.value),
        inputs.alpha.float().contiguous(),
        inputs.omega.float().contiguous(),
        inputs.ranges.float().contiguous(),
        unit_stride(inputs.modulation),
        inputs.num_heads,
        None if initial_state is None else initial_state.float().contiguous(),
        None if resets is None else resets.contiguous(),
        inputs.input_norm,
    )
    return outputs, final_state, energy


@functools.cache
def unavailable() -> str | None:
    """Why there is no C++ operator here, or None once it is loaded.

    The first call compiles it where that has not been done before.
    """
    reason = native.unavailable()
    if reason is None:
        namespace = "ten_dist_cpu::matrix_scan"
        torch.library.register_fake(f"{namespace}_forward", _fake_forward)
        torch.library.register_fake(f"{namespace}_backward", _fake_backward)
    return reason


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in tensors
    )


# A schema of an operator has no tuples: it lists the fields of MatrixScanInputs, in their
# order.
def _fake_forward(*arguments) -> tuple[Tensor, ...]:
    inputs = MatrixScanInputs(*arguments)
    batch, steps, halves = inputs.key.shape
    size = halves * inputs.state_dim
    return (
        *_contiguous_like(inputs.value),
        inputs.alpha.new_empty(batch, size),
        inputs.alpha.new_empty(batch, halves // 2),
        inputs.alpha.new_empty(batch, (steps - 1) // _CHUNK, size),
    )


def _fake_backward(
    grad_outputs: Tensor,
    grad_final: Tensor,
    grad_energy: Tensor,
    entering: Tensor,
    *rest,
) -> tuple[Tensor, ...]:
    inputs = MatrixScanInputs(*rest)
    return (
        *_contiguous_like(inputs.key, inputs.query, inputs.value, inputs.modulation),
        inputs.alpha.new_empty(4, inputs.alpha.shape[0]),
        *_contiguous_like(grad_final),
    )

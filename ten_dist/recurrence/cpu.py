"""The eigenstate scan as a C++ operator for CPUs (`ten_dist/native/scan.cpp`).

As a registered operator with a fake implementation it does not break a graph under
`torch.compile`.

Memory for backward: the arguments and the returned states, which the caller holds
anyway. Eigenvalues are computed again from the modulation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ten_dist import native
from ten_dist.recurrence.inputs import ScanInputs, unit_stride
from ten_dist.recurrence.operator import register_tracing


def cpu_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` for float32, bfloat16 and float16 on the CPU, with the energy.

    The operator is the one that :func:`unavailable` has loaded. It has no float16, which
    trains on GPUs: such inputs are converted to float32, in memory of their own, and the
    states back. They are then rounded once, and backward works with those from before.
    """
    beta, alpha, omega, ranges, modulation, initial_state, resets, input_norm = inputs
    if beta.dtype == torch.float16:
        states, final_state, energy = cpu_scan(inputs._replace(beta=beta.float()))
        return states.to(beta.dtype), final_state, energy
    return torch.ops.ten_dist_cpu.scan_forward(
        unit_stride(beta),
        alpha.float().contiguous(),
        omega.float().contiguous(),
        ranges.float().contiguous(),
        None if modulation is None else unit_stride(modulation.to(beta.dtype)),
        None if initial_state is None else initial_state.float().contiguous(),
        None if resets is None else resets.contiguous(),
        input_norm,
    )


@functools.cache
def unavailable() -> str | None:
    """Why there is no C++ operator here, or None once it is loaded.

    The first call compiles it where that has not been done before.
    """
    reason = native.unavailable()
    if reason is None:
        register_tracing("ten_dist_cpu")
    return reason

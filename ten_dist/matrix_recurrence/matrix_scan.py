"""`matrix_scan`, the recurrence of a matrix layer, and the choice of its backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ten_dist.matrix_recurrence import matrix_cpu
from ten_dist.matrix_recurrence.matrix_blocked import blocked_matrix_scan
from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.matrix_recurrence.matrix_reference import reference_matrix_scan
from ten_dist.matrix_recurrence.matrix_triton import triton_matrix_scan
from ten_dist.recurrence import triton_scan
from ten_dist.recurrence.blocked import blocked_scan
from ten_dist.recurrence.observer import ScanObserver, current_observer
from ten_dist.recurrence.scan import constant_of_graphs, warn_of_slow_scan

_Scan = Callable[[MatrixScanInputs], tuple[Tensor, Tensor, Tensor]]
_BACKENDS: dict[str, _Scan] = {
    "triton": triton_matrix_scan,
    "cpu": matrix_cpu.cpu_matrix_scan,
    "blocked": blocked_matrix_scan,
    "reference": reference_matrix_scan,
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first.

    `triton` is for tensors on GPUs (where Triton interprets, for those of the CPU), `cpu`
    for tensors of the CPU, neither for float64; the others are for all.
    """
    device_type = "cpu" if triton_scan.interpreted() else "cuda"
    missing = {
        "triton": triton_scan.unavailable(device_type),
        "cpu": matrix_cpu.unavailable(),
    }
    return tuple(name for name in _BACKENDS if missing.get(name) is None)


def matrix_scan(
    inputs: MatrixScanInputs, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K complex eigenstates that carry N numbers each, and read them by queries.

        S_k(t) = lambda_k(t) S_k(t-1) + g_k(t) key_k(t) value_h(t)^T     in C^N
        o_h(t) = (K/H)^-1/2 Re sum_k conj(query_k(t)) S_k(t)             k in head h

    with lambda and g as in `eigenstate_scan_with_energy`, whose notes on resets and on the
    dtype of the state hold here, too.

    Args:
        backend: a name of `available_backends`, or "auto": `cpu` for tensors of the CPU
            that it takes, `blocked` for all others.

    Returns:
        outputs: [B, T, H N], o, in the dtype of `key`.
        final_state: [B, 2K N], the last state, in the dtype it was carried in.
        energy: [B, K], the sum over time of the squared norm of S_k(t), in the dtype of the
            state.
        All are differentiable in every real tensor of the inputs.

    Raises:
        ValueError: shapes do not agree, a name is unknown, or its backend does not take
            these inputs.
    """
    inputs.check()
    name = _fastest_for(inputs.key) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(
            f"unknown matrix scan backend {backend!r}: this machine has auto, "
            f"{', '.join(available_backends())}"
        )
    if name in ("triton", "cpu") and (reason := _why_not(name, inputs.key)):
        raise ValueError(f"matrix scan backend {name} cannot run: {reason}")
    results = _BACKENDS[name](inputs)
    if (observer := current_observer()) is not None:
        _show(observer, inputs, results[1])
    return results


@torch.no_grad()
def _show(
    observer: ScanObserver, inputs: MatrixScanInputs, final_state: Tensor
) -> None:
    """Show the scans of all columns, the last state of each as `final_state` has it.

    No backend keeps the states between the steps: they are computed apart, a column at a
    time, as all together are N times as large as those of eigenstates without vectors.
    """
    last = final_state.unflatten(-1, (-1, inputs.state_dim))
    inputs = inputs.in_state_dtype()
    for column in range(inputs.state_dim):
        scan = inputs.of_column(column)
        states = blocked_scan(scan)[0]
        states[:, -1] = last[..., column]
        observer.see(scan, states, column)


def _fastest_for(key: Tensor) -> str:
    # Not Triton's kernels on a GPU: they have run in the interpreter alone, and compiled
    # for sm_90 they spill registers to memory.
    if key.device.type != "cpu" or key.dtype == torch.float64:
        return "blocked"
    reason = _why_not("cpu", key)
    if reason is None:
        return "cpu"
    warn_of_slow_scan(reason)
    return "blocked"


def _why_not(name: str, key: Tensor) -> str | None:
    """Why the compiled backend `name` cannot take inputs like `key`, or None."""
    if key.dtype == torch.float64:
        return f"it takes float32, bfloat16 and float16, not {key.dtype}"
    return _unavailable(name, key.device.type)


@constant_of_graphs
def _unavailable(name: str, device_type: str) -> str | None:
    if name == "triton":
        return triton_scan.unavailable(device_type)
    if device_type != "cpu":
        return f"it takes tensors of the CPU, not of {device_type}"
    return matrix_cpu.unavailable()

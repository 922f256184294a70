"""`eigenstate_scan`, the recurrence of a TEN layer, and the choice of its backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ten_dist.recurrence import cpu, triton_scan
from ten_dist.recurrence.blocked import blocked_scan
from ten_dist.recurrence.inputs import Number, ScanInputs, as_ranges
from ten_dist.recurrence.observer import current_observer
from ten_dist.recurrence.reference import reference_scan

_Scan = Callable[[ScanInputs], tuple[Tensor, Tensor, Tensor]]
_BACKENDS: dict[str, _Scan] = {
    "triton": triton_scan.triton_scan,
    "cpu": cpu.cpu_scan,
    "blocked": blocked_scan,
    "reference": reference_scan,
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first.

    `triton` is for tensors on GPUs (where Triton interprets, for those of the CPU), `cpu`
    for tensors of the CPU, the others for both.
    """
    device_type = "cpu" if triton_scan.interpreted() else "cuda"
    missing = {
        "triton": triton_scan.unavailable(device_type),
        "cpu": cpu.unavailable(),
    }
    return tuple(name for name in _BACKENDS if missing.get(name) is None)


def eigenstate_scan(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None = None,
    selection_range: tuple[Number, Number] = (0.1, 0.1),
    input_norm: str = "none",
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run K complex eigenstates over a sequence without resets (docs/model.md#scan).

    Args:
        selection_range: (s_a, s_w): numbers, or tensors of one or of K elements.
        backend: see :func:`eigenstate_scan_with_energy`.
        others: the fields of :class:`ScanInputs`.

    Returns:
        states, final_state: as :func:`eigenstate_scan_with_energy`.

    Raises:
        ValueError: shapes do not agree, or a name is unknown.
    """
    ranges = as_ranges(selection_range, alpha)
    inputs = ScanInputs(
        beta, alpha, omega, ranges, modulation, initial_state, None, input_norm
    )
    return eigenstate_scan_with_energy(inputs, backend)[:2]


def eigenstate_scan_with_energy(
    inputs: ScanInputs, backend: str = "auto", observable: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K complex eigenstates over a sequence, and sum up their energy.

        c_k(t) = lambda_k(t) c_k(t-1) + g_k(t) beta_k(t)
        lambda_k(t) = sigmoid(alpha_k + s_a tanh p_k(t)) exp(i (omega_k + s_w tanh q_k(t)))

    The state is carried in float32 (float64 where `beta` is float64) whatever the dtype
    of `beta`.

    Where `resets` is set the state starts anew, c_k(t) = g_k(t) beta_k(t): no finite
    number that came before t, the initial state included, has any effect from there on.
    The input gain stays that of the eigenvalue, so that what follows is what the same
    steps give by themselves from a state of zeros.

    Args:
        backend: a name of :func:`available_backends`, or "auto" for the fastest that
            takes these inputs.
        observable: show the scan to the :mod:`ten_dist.recurrence.observer` of the block.

    Returns:
        states: [B, T, 2K], the state after each step, in the dtype of `beta`.
        final_state: [B, 2K], the last state, in the dtype it was carried in.
        energy: [B, K], the sum over time of |c_k(t)|^2, in the dtype of the state.
        All are differentiable in every real tensor of the inputs.

    Raises:
        ValueError: shapes do not agree, or a name is unknown.
    """
    inputs.check()
    name = _fastest_for(inputs.beta) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(
            f"unknown scan backend {backend!r}: this machine has auto, "
            f"{', '.join(available_backends())}"
        )
    if name in ("cpu", "triton"):
        _check_takes(name, inputs.beta)
    results = _BACKENDS[name](inputs)
    if observable and (observer := current_observer()) is not None:
        # Resets take energy away: the bound holds with them as it does without.
        observer.see(inputs, results[0])
    return results


def _fastest_for(beta: Tensor) -> str:
    if beta.dtype == torch.float64:
        return "blocked"
    return _fastest_on(beta.device.type)


def constant_of_graphs(function: Callable) -> Callable:
    """Let a compiled graph take what `function` returns as a constant, untraced.

    This is torch.compiler.assume_constant_result without its import of the compiler,
    which takes seconds that a program without a compiled graph need not spend.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's mark
    return function


@constant_of_graphs
def _fastest_on(device_type: str) -> str:
    name = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if name is None:
        return "blocked"
    reason = _unavailable(name, device_type)
    if reason is None:
        return name
    warn_of_slow_scan(reason)
    return "blocked"


@constant_of_graphs
def _unavailable(name: str, device_type: str) -> str | None:
    """Why the backend `name` cannot run on devices of this type, or None."""
    if name == "triton":
        return triton_scan.unavailable(device_type)
    if device_type != "cpu":
        return f"it takes tensors of the CPU, not of {device_type}"
    return cpu.unavailable()


@functools.cache
def warn_of_slow_scan(reason: str) -> None:
    """Say once why a scan is not run by the backend that is made for its device."""
    warnings.warn(
        f"the scan runs in pure torch, slower than it could: {reason}", stacklevel=2
    )


def _check_takes(name: str, beta: Tensor) -> None:
    reason = _unavailable(name, beta.device.type)
    if reason is not None:
        raise ValueError(f"scan backend {name} is not available: {reason}")
    if beta.dtype == torch.float64:
        raise ValueError(
            f"scan backend {name} takes float32, bfloat16 and float16, not {beta.dtype}"
        )

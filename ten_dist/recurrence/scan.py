"""`eigenstate_scan`, the recurrence of a TEN layer, and the choice of its backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ten_dist.recurrence import cpu, triton_scan
from ten_dist.recurrence.blocked import blocked_scan
from ten_dist.recurrence.bound import current_observer
from ten_dist.recurrence.reference import reference_scan

Number = float | Tensor
_Scan = tuple[Tensor, Tensor, Tensor]
_BACKENDS: dict[str, Callable[..., _Scan]] = {
    "triton": triton_scan.triton_scan,
    "cpu": cpu.cpu_scan,
    "blocked": blocked_scan,
    "reference": reference_scan,
}

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run K complex eigenstates over a sequence (docs/model.md#scan).

        c_k(t) = lambda_k(t) c_k(t-1) + g_k(t) beta_k(t)
        lambda_k(t) = sigmoid(alpha_k + s_a tanh p_k(t)) exp(i (omega_k + s_w tanh q_k(t)))

    Complex numbers are stored as two real halves: columns [0, K) are real parts,
    columns [K, 2K) imaginary parts. The state is carried in float32 (float64 where
    `beta` is float64) whatever the dtype of `beta`.

    Where `resets` is set the state starts anew, c_k(t) = g_k(t) beta_k(t): no finite
    number that came before t, the initial state included, has any effect from there on.
    The input gain stays that of the eigenvalue, so that what follows is what the same
    steps give by themselves from a state of zeros.

    Args:
        beta: [B, T, 2K] input; float64, float32, bfloat16 or float16, any strides, T >= 1.
        alpha: [K] logits of the base decay.
        omega: [K] base rotation, radians a step.
        modulation: [B, T, 2K] p in the first half and q in the second, before tanh,
            or None for eigenvalues that do not depend on the input.
        selection_range: (s_a, s_w), the largest change of alpha and of omega: numbers,
            or tensors of one or of K elements.
        input_norm: input gain g: "none" 1; "static" sqrt(1 - rho_k^2) of the base
            decay; "dynamic" sqrt(1 - rho_k(t)^2).
        initial_state: [B, 2K] state before the first step, or None for zeros.
        backend: a name of :func:`available_backends`, or "auto" for the fastest that
            takes these arguments.
        resets: [B, T] bool, steps before which the state is dropped, or None for none.

    Returns:
        states: [B, T, 2K], the state after each step, in the dtype of `beta`.
        final_state: [B, 2K], the last state, in the dtype it was carried in.
        Both are differentiable in every tensor argument.

    Raises:
        ValueError: shapes do not agree, or a name is unknown.
    """
    return eigenstate_scan_with_energy(
        beta,
        alpha,
        omega,
        modulation,
        selection_range,
        input_norm,
        initial_state,
        backend,
        resets,
    )[:2]


def eigenstate_scan_with_energy(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None = None,
    selection_range: tuple[Number, Number] = (0.1, 0.1),
    input_norm: str = "none",
    initial_state: Tensor | None = None,
    backend: str = "auto",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan`, and the energy taken in the same pass.

    Returns:
        states, final_state: as :func:`eigenstate_scan`.
        energy: [B, K], the sum over time of |c_k(t)|^2, in the dtype of the state.
    """
    _check_arguments(beta, alpha, omega, modulation, input_norm, initial_state, resets)
    name = _fastest_for(beta) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(
            f"unknown scan backend {backend!r}: this machine has auto, "
            f"{', '.join(available_backends())}"
        )
    if name in ("cpu", "triton"):
        _check_takes(name, beta)
    ranges = torch.stack([_as_range(s, alpha) for s in selection_range])
    arguments = (beta, alpha, omega, modulation, ranges, input_norm, initial_state)
    results = _BACKENDS[name](*arguments, resets)
    if (observer := current_observer()) is not None:
        # Resets take energy away: the bound holds with them as it does without.
        observer.see(*arguments, results[0])
    return results


def _as_range(number: Number, alpha: Tensor) -> Tensor:
    """A selection range as a tensor [K]."""
    if isinstance(number, Tensor):
        return number.to(alpha).expand_as(alpha)
    # Filled where it is needed: a copy from the CPU would wait for the GPU.
    return torch.full_like(alpha, number)


def _fastest_for(beta: Tensor) -> str:
    if beta.dtype == torch.float64:
        return "blocked"
    return _fastest_on(beta.device.type)


def _constant_of_graphs(function: Callable) -> Callable:
    """Let a compiled graph take what `function` returns as a constant, untraced.

    This is torch.compiler.assume_constant_result without its import of the compiler,
    which takes seconds that a program without a compiled graph need not spend.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_of_graphs
def _fastest_on(device_type: str) -> str:
    name = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if name is None:
        return "blocked"
    reason = _unavailable(name, device_type)
    if reason is None:
        return name
    _warn_of_slow_scan(reason)
    return "blocked"


@_constant_of_graphs
def _unavailable(name: str, device_type: str) -> str | None:
    """Why the backend `name` cannot run on devices of this type, or None."""
    if name == "triton":
        return triton_scan.unavailable(device_type)
    if device_type != "cpu":
        return f"it takes tensors of the CPU, not of {device_type}"
    return cpu.unavailable()


@functools.cache
def _warn_of_slow_scan(reason: str) -> None:
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


def _check_arguments(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    input_norm: str,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> None:
    if beta.dim() != 3 or beta.shape[1] < 1 or beta.shape[2] % 2:
        raise ValueError(f"beta must be [B, T, 2K] with T >= 1, not {_shape(beta)}")
    if beta.dtype not in _DTYPES:
        raise ValueError(
            f"beta must be float64, float32, bfloat16 or float16, not {beta.dtype}"
        )
    batch, _, width = beta.shape
    for name, tensor in (("alpha", alpha), ("omega", omega)):
        if tensor.shape != (width // 2,):
            raise ValueError(
                f"{name} must be [{width // 2}] for beta {_shape(beta)}, "
                f"not {_shape(tensor)}"
            )
    if modulation is not None and modulation.shape != beta.shape:
        raise ValueError(
            f"modulation must have the shape of beta, {_shape(beta)}, "
            f"not {_shape(modulation)}"
        )
    if initial_state is not None and initial_state.shape != (batch, width):
        raise ValueError(
            f"initial_state must be [{batch}, {width}], not {_shape(initial_state)}"
        )
    if resets is not None and (
        resets.shape != beta.shape[:2] or resets.dtype != torch.bool
    ):
        raise ValueError(
            f"resets must be bool {_shape(beta[..., 0])}, "
            f"not {resets.dtype} {_shape(resets)}"
        )
    if input_norm not in ("none", "static", "dynamic"):
        raise ValueError(
            f"input_norm must be none, static or dynamic, not {input_norm!r}"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))

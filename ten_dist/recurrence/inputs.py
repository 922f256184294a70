"""The arguments of a scan, in the one order that every backend and operator takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = float | Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ScanInputs(NamedTuple):
    """The recurrence of `eigenstate_scan` for B rows, T >= 1 steps and K eigenstates.

    Complex numbers are stored as two real halves: columns [0, K) are real parts,
    columns [K, 2K) imaginary parts. Tensors may have any strides.
    """

    beta: Tensor
    """[B, T, 2K] input; float64, float32, bfloat16 or float16."""
    alpha: Tensor
    """[K] logits of the base decay, float32 or float64."""
    omega: Tensor
    """[K] base rotation, radians a step, float32 or float64."""
    ranges: Tensor
    """[2, K] s_a and s_w, the largest change of alpha and of omega; float32 or float64."""
    modulation: Tensor | None = None
    """[B, T, 2K] p in the first half and q in the second, before tanh, in any of the
    dtypes of `beta`; None for eigenvalues that do not depend on the input."""
    initial_state: Tensor | None = None
    """[B, 2K] state before the first step, in any dtype; None for zeros."""
    resets: Tensor | None = None
    """[B, T] bool, steps before which the state is dropped; None for none."""
    input_norm: str = "none"
    """Input gain g: "none" 1; "static" sqrt(1 - rho_k^2) of the base decay; "dynamic"
    sqrt(1 - rho_k(t)^2)."""

    def in_state_dtype(self) -> ScanInputs:
        """These with all real tensors in the dtype in which the state is carried."""
        dtype = state_dtype(self.beta)

        def converted(value: Any) -> Any:
            is_real = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_real else value

        return ScanInputs(*map(converted, self))

    def check(self) -> None:
        """Raise a ValueError that names the argument whose shape or value is wrong."""
        beta = self.beta
        if beta.dim() != 3 or beta.shape[1] < 1 or beta.shape[2] % 2:
            raise ValueError(f"beta must be [B, T, 2K] with T >= 1, not {_shape(beta)}")
        if beta.dtype not in _DTYPES:
            raise ValueError(
                f"beta must be float64, float32, bfloat16 or float16, not {beta.dtype}"
            )
        batch, steps, halves = beta.shape
        width = halves // 2
        for name, shape in (
            ("alpha", (width,)),
            ("omega", (width,)),
            ("ranges", (2, width)),
            ("modulation", (batch, steps, halves)),
            ("initial_state", (batch, halves)),
        ):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {list(shape)} for beta {_shape(beta)}, "
                    f"not {_shape(tensor)}"
                )
        resets = self.resets
        if resets is not None and (
            resets.shape != (batch, steps) or resets.dtype != torch.bool
        ):
            raise ValueError(
                f"resets must be bool {[batch, steps]}, "
                f"not {resets.dtype} {_shape(resets)}"
            )
        if self.input_norm not in ("none", "static", "dynamic"):
            raise ValueError(
                f"input_norm must be none, static or dynamic, not {self.input_norm!r}"
            )


def as_ranges(selection_range: tuple[Number, Number] | Tensor, alpha: Tensor) -> Tensor:
    """[2, K] ranges of numbers or tensors of one or of K elements, in the dtype of alpha."""

    def expanded(number: Number) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(alpha).expand_as(alpha)
        # Filled where it is needed: a copy from the CPU would wait for the GPU.
        return torch.full_like(alpha, number)

    return torch.stack([expanded(number) for number in selection_range])


def state_dtype(beta: Tensor) -> torch.dtype:
    """Real dtype in which the state of input `beta` is carried."""
    return torch.float64 if beta.dtype == torch.float64 else torch.float32


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself where neighbours in its last dimension are neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))

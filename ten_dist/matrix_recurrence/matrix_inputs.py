"""The arguments of a matrix scan, in the one order that every backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ten_dist.recurrence.inputs import ScanInputs, state_dtype


class MatrixScanInputs(NamedTuple):
    """The recurrence of `matrix_scan` for B rows, T >= 1 steps, H heads, K eigenstates
    of the layer and N numbers that each of them carries.

    Complex numbers are two real halves, as in :class:`ScanInputs`. Head h has the K/H
    eigenstates from h K/H on in both halves, and the N values from h N on. Tensors may have
    any strides.
    """

    key: Tensor
    """[B, T, 2K] what writes; float64, float32, bfloat16 or float16."""
    query: Tensor
    """[B, T, 2K] what reads, in the dtype of `key`."""
    value: Tensor
    """[B, T, H N] what is written, in the dtype of `key`."""
    alpha: Tensor
    """[K] logits of the base decay, float32 or float64."""
    omega: Tensor
    """[K] base rotation, radians a step, float32 or float64."""
    ranges: Tensor
    """[2, K] s_a and s_w, the largest change of alpha and of omega; float32 or float64."""
    modulation: Tensor
    """[B, T, 2K] p in the first half and q in the second, before tanh, in the dtype of
    `key`."""
    num_heads: int
    """H."""
    initial_state: Tensor | None = None
    """[B, 2K N] state before the first step, eigenstate by eigenstate of the real half,
    then of the imaginary half, N numbers each; None for zeros."""
    resets: Tensor | None = None
    """[B, T] bool, steps before which the state is dropped; None for none."""
    input_norm: str = "none"
    """Input gain g, as in :class:`ScanInputs`."""

    @property
    def state_dim(self) -> int:
        """N, numbers that one eigenstate carries."""
        return self.value.shape[-1] // self.num_heads

    def starts(self) -> Tensor:
        """[B, T] bool, steps whose state does not depend on one before: resets, and the
        first step where there is no initial state."""
        resets = self.resets
        if resets is None:
            resets = self.key.new_zeros(self.key.shape[:2], dtype=torch.bool)
        if self.initial_state is None:
            first = torch.arange(resets.shape[1], device=resets.device) == 0
            resets = resets | first
        return resets

    def of_keys(self) -> ScanInputs:
        """The scan of eigenstates without vectors that has these eigenvalues."""
        eigenvalues = self.alpha, self.omega, self.ranges, self.modulation
        return ScanInputs(self.key, *eigenvalues, None, self.resets, self.input_norm)

    def of_column(self, column: int) -> ScanInputs:
        """The scan that the entries at one place of the vectors are."""
        halves = self.key.shape[-1]
        value = self.value.unflatten(-1, (self.num_heads, -1))[..., column]
        value = value.repeat_interleave(halves // 2 // self.num_heads, dim=-1)
        initial = self.initial_state
        if initial is not None:
            initial = initial.unflatten(-1, (halves, -1))[..., column]
        written = self.key * torch.cat([value, value], dim=-1)
        return self.of_keys()._replace(beta=written, initial_state=initial)

    def in_state_dtype(self) -> MatrixScanInputs:
        """These with all real tensors in the dtype in which the state is carried."""
        dtype = state_dtype(self.key)

        def converted(value: Any) -> Any:
            is_real = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_real else value

        return MatrixScanInputs(*map(converted, self))

    def check(self) -> None:
        """Raise a ValueError that names the argument whose shape or value is wrong."""
        self.of_keys().check()
        batch, steps, halves = self.key.shape
        heads = self.num_heads
        if heads < 1 or halves // 2 % heads or self.value.shape[-1] % heads:
            raise ValueError(
                f"num_heads must divide {halves // 2} eigenstates and "
                f"{self.value.shape[-1]} values, not {heads}"
            )
        for name, shape in (
            ("query", (batch, steps, halves)),
            ("value", (batch, steps, heads * self.state_dim)),
            ("initial_state", (batch, halves * self.state_dim)),
        ):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {list(shape)} for key {list(self.key.shape)}, "
                    f"not {list(tensor.shape)}"
                )
        for name in ("query", "value", "modulation"):
            if (dtype := getattr(self, name).dtype) != self.key.dtype:
                raise ValueError(
                    f"{name} must be {self.key.dtype}, as key is, not {dtype}"
                )


def matrix_to_complex(halves: Tensor, num_heads: int) -> Tensor:
    """[..., 2K] real and imaginary halves to [..., H, K/H] complex."""
    real, imaginary = halves.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous()).unflatten(
        -1, (num_heads, -1)
    )


def entering_matrices(inputs: MatrixScanInputs) -> Tensor:
    """[B, H, K/H, N] complex states before the first step, of inputs in the state dtype."""
    batch, _, halves = inputs.key.shape
    shape = (2, inputs.num_heads, halves // 2 // inputs.num_heads, inputs.state_dim)
    if inputs.initial_state is None:
        real = imaginary = inputs.key.new_zeros(batch, *shape[1:])
    else:
        real, imaginary = inputs.initial_state.unflatten(-1, shape).unbind(1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def leaving_matrices(states: Tensor) -> Tensor:
    """[B, H, K/H, N] complex states to [B, 2K N], as `initial_state` has them."""
    return torch.stack([states.real, states.imag], dim=1).flatten(1)

"""The eigenstate scan on GPUs: its Triton kernels, launched and registered.

As registered operators with fake implementations they do not break a graph under
`torch.compile`. Triton is imported when the scan first runs, not with this module.

Memory for backward: the arguments and the returned states, which the caller holds
anyway. Eigenvalues are computed again from the modulation. Every sum is taken in one
order: repeated runs give the same bits.

Not yet run, nor measured, on a GPU: the tests interpret the kernels, and compile them for
a Hopper GPU. `benchmarks/gpu.py` checks and measures them where there is one, and its
`tune` tries other sizes than those below.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import Tensor

from ten_dist.recurrence.operator import (
    register_autograd,
    register_tracing,
    unit_stride,
)

BLOCK = 32
"""Eigenstates of a program."""
WARPS = 1
"""Warps of a program: with one, a thread for each eigenstate."""
UNROLL = 8
"""Steps that are read ahead, forward and in the carry."""
UNROLL_BACKWARD = 4
"""The same in backward, which reads twice as much a step: more would take registers that
the next program could run in."""
CARRY_LIMIT = 512
"""Chunks that are carried one after the other; more are carried in groups."""
CARRY_GROUP = 64
"""Chunks of a group."""
OLDEST_GPU = (8, 0)
"""Compute capability from which Triton supports GPUs."""

_ARGUMENTS = (
    "Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, Tensor? modulation, "
    "Tensor? initial, Tensor? resets, str input_norm"
)


def triton_scan(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` for float32, bfloat16 and float16, with the energy.

    :func:`unavailable` is None for the device of `beta`.
    """
    return _scan_forward(
        beta,
        alpha.float(),
        omega.float(),
        ranges.float(),
        modulation,
        None if initial_state is None else initial_state.float(),
        resets,
        input_norm,
    )


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on devices of this type, or None if they can."""
    if device_type == "cpu" and not interpreted():
        return "Triton runs on GPUs (on the CPU with TRITON_INTERPRET=1, for tests)"
    if device_type not in ("cpu", "cuda"):
        return f"Triton runs on GPUs, not on {device_type}"
    return _unusable(device_type)


def interpreted() -> bool:
    """Whether Triton was told to run kernels in Python instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@functools.cache
def _unusable(device_type: str) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        capability = torch.cuda.get_device_capability()
        if torch.version.hip is None and capability < OLDEST_GPU:
            return (
                f"the GPU has compute capability {capability[0]}.{capability[1]}, "
                f"and Triton needs {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
            )
    return None


def chunk_steps(steps: int) -> int:
    """Steps of a chunk: enough chunks to fill a GPU, few enough to carry quickly.

    It depends on the length alone, so that a row's result does not depend on the batch
    that it is computed in.
    """
    if steps <= 4096:
        return 64
    return 128 if steps <= 16384 else 256


@torch.library.custom_op(
    "ten_dist_triton::scan_forward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _scan_forward(beta, alpha, omega, ranges, modulation, initial, resets, input_norm):
    from ten_dist.recurrence import triton_forward

    batch, steps, width = beta.shape[0], beta.shape[1], beta.shape[2] // 2
    chunk = chunk_steps(steps)
    chunks = -(-steps // chunk)
    options = _options(width, UNROLL) | _variant(modulation, input_norm)
    options["RESET"] = resets is not None
    inputs, strides = _with_strides(beta, beta if modulation is None else modulation)
    base = tuple(t.contiguous() for t in (alpha, omega, ranges))
    initial = None if initial is None else initial.contiguous()
    flags = _flags(resets, beta)
    sizes = (steps, chunk, *strides)
    states = torch.empty_like(beta, memory_format=torch.contiguous_format)
    final = alpha.new_empty(batch, 2 * width)
    energy = alpha.new_empty(batch, chunks, width)
    with _on_device_of(beta):
        entering = initial
        if chunks > 1:
            product = alpha.new_empty(batch, chunks, 2 * width)
            local = torch.empty_like(product)
            triton_forward.reduce_forward[_grid(batch, width, chunks)](
                *inputs, flags, *base, product, local, *sizes, **options
            )
            entering = _carry(product, local, initial, reverse=False)
        triton_forward.scan_forward[_grid(batch, width, chunks)](
            *inputs,
            flags,
            *base,
            alpha if entering is None else entering,
            states,
            final,
            energy,
            *sizes,
            HAS_ENTERING=entering is not None,
            **options,
        )
    return states, final, energy.sum(dim=1)


@torch.library.custom_op(
    "ten_dist_triton::scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_states, Tensor? grad_final, Tensor? grad_energy, Tensor states, "
        f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(
    grad_states,
    grad_final,
    grad_energy,
    states,
    beta,
    alpha,
    omega,
    ranges,
    modulation,
    initial,
    resets,
    input_norm,
):
    from ten_dist.recurrence import triton_backward

    batch, steps, width = beta.shape[0], beta.shape[1], beta.shape[2] // 2
    chunk = chunk_steps(steps)
    chunks = -(-steps // chunk)
    grid = _grid(batch, width, chunks)
    variant = _variant(modulation, input_norm)
    options = _options(width, UNROLL_BACKWARD)
    options |= {"ENERGY": grad_energy is not None, "RESET": resets is not None}
    flags = _flags(resets, beta)
    logits = beta if modulation is None else modulation
    base = tuple(t.contiguous() for t in (alpha, omega, ranges))
    has_initial = initial is not None
    initial = initial.contiguous() if has_initial else alpha
    weight = alpha if grad_energy is None else grad_energy.contiguous()
    states = states.contiguous()
    grad_beta = torch.empty_like(beta, memory_format=torch.contiguous_format)
    grad_modulation = (
        beta.new_empty(0)
        if modulation is None
        else torch.empty_like(modulation, memory_format=torch.contiguous_format)
    )
    grad_initial = alpha.new_empty(batch, 2 * width)
    sums = alpha.new_empty(batch, chunks, 4, width)
    with _on_device_of(beta):
        entering = None if grad_final is None else grad_final.contiguous()
        if chunks > 1:
            product = alpha.new_empty(batch, chunks, 2 * width)
            local = torch.empty_like(product)
            (gradient, logits), strides = _with_strides(grad_states, logits)
            triton_backward.reduce_backward[grid](
                gradient,
                weight,
                states,
                logits,
                flags,
                *base,
                product,
                local,
                steps,
                chunk,
                *strides,
                MODULATED=variant["MODULATED"],
                **options,
            )
            entering = _carry(product, local, entering, reverse=True)
        inputs, strides = _with_strides(grad_states, beta, logits)
        gradient, drive, logits = inputs
        triton_backward.scan_backward[grid](
            gradient,
            weight,
            alpha if entering is None else entering,
            states,
            drive,
            logits,
            flags,
            *base,
            initial,
            grad_beta,
            grad_beta if modulation is None else grad_modulation,
            grad_initial,
            sums,
            steps,
            chunk,
            *strides,
            HAS_INITIAL=has_initial,
            HAS_ENTERING=entering is not None,
            **options,
            **variant,
        )
    return grad_beta, grad_modulation, sums.sum(dim=(0, 1)), grad_initial


def _carry(
    product: Tensor, local: Tensor, initial: Tensor | None, reverse: bool
) -> Tensor:
    """What enters each chunk, [B, chunks, 2K], from what enters the first (the last
    where `reverse`), [B, 2K] or None for zeros."""
    from ten_dist.recurrence import triton_chunks

    batch, chunks, width = product.shape[0], product.shape[1], product.shape[2] // 2
    options = _options(width, UNROLL) | {"REVERSED": reverse}
    group, groups = chunks, 1
    if chunks > CARRY_LIMIT:
        group = CARRY_GROUP
        groups = -(-chunks // group)
        group_product = product.new_empty(batch, groups, 2 * width)
        group_local = torch.empty_like(group_product)
        triton_chunks.compose[_grid(batch, width, groups)](
            product, local, group_product, group_local, chunks, group, **options
        )
        initial = _carry(group_product, group_local, initial, reverse)
    entering = torch.empty_like(local)
    triton_chunks.carry[_grid(batch, width, groups)](
        product,
        local,
        local if initial is None else initial,
        entering,
        chunks,
        group,
        HAS_ENTERING=initial is not None,
        **options,
    )
    return entering


def _grid(batch: int, width: int, chunks: int) -> tuple[int, int]:
    return batch * -(-width // BLOCK), chunks


def _options(width: int, unroll: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "BLOCK": BLOCK,
        "UNROLL": unroll,
        "num_warps": WARPS,
        # Triton 3.10 will not fuse multiplication and addition unless it is told to.
        "enable_fp_fusion": True,
    }


def _variant(modulation: Tensor | None, input_norm: str) -> dict[str, int]:
    """Which kernels: without modulation, the dynamic gain is the static one."""
    gain = {"none": 0, "static": 1, "dynamic": 2}[input_norm]
    return {
        "MODULATED": modulation is not None,
        "GAIN": gain if modulation is not None else min(gain, 1),
    }


def _flags(resets: Tensor | None, otherwise: Tensor) -> Tensor:
    """Resets as bytes, or any tensor where there are none."""
    return otherwise if resets is None else resets.contiguous().view(torch.uint8)


def _with_strides(*sequences: Tensor) -> tuple[tuple[Tensor, ...], list[int]]:
    """The tensors with a unit last stride, and the strides of batch and time of each."""
    sequences = tuple(unit_stride(s) for s in sequences)
    return sequences, [stride for s in sequences for stride in s.stride()[:2]]


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the device of the arguments.
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


register_tracing("ten_dist_triton")
register_autograd("ten_dist_triton")

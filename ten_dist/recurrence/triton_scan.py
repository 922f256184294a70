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

from ten_dist.recurrence.inputs import ScanInputs, unit_stride
from ten_dist.recurrence.operator import (
    empty_gradients,
    empty_states,
    register_tracing,
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

# A schema of an operator has no tuples: it lists the fields of ScanInputs, in their order.
_ARGUMENTS = (
    "Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, Tensor? modulation, "
    "Tensor? initial_state, Tensor? resets, str input_norm"
)


def triton_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` for float32, bfloat16 and float16, with the energy.

    :func:`unavailable` is None for the device of `beta`.
    """
    initial = inputs.initial_state
    return _scan_forward(
        *inputs._replace(
            alpha=inputs.alpha.float(),
            omega=inputs.omega.float(),
            ranges=inputs.ranges.float(),
            initial_state=None if initial is None else initial.float(),
        )
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
def _scan_forward(*arguments):
    from ten_dist.recurrence import triton_forward

    inputs = ScanInputs(*arguments)
    alpha, initial = inputs.alpha, inputs.initial_state
    launch = _Launch(inputs, UNROLL)
    options = launch.options | launch.gain
    given = (launch.drive, launch.logits, *launch.base)
    sizes = (*launch.sizes, *strides(launch.drive, launch.logits))
    states, final = empty_states(inputs)
    energy = alpha.new_empty(launch.batch, launch.chunks, launch.width)
    entering = None if initial is None else initial.contiguous()
    with on_device_of(inputs.beta):
        if launch.chunks > 1:
            product, local = launch.empty_transitions(alpha)
            triton_forward.reduce_forward[launch.grid](
                *given, product, local, *sizes, **options
            )
            entering = _carry(product, local, entering, reverse=False)
        triton_forward.scan_forward[launch.grid](
            *given,
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
def _scan_backward(grad_states, grad_final, grad_energy, states, *arguments):
    from ten_dist.recurrence import triton_backward

    inputs = ScanInputs(*arguments)
    alpha, initial = inputs.alpha, inputs.initial_state
    launch = _Launch(inputs, UNROLL_BACKWARD)
    options = launch.options | {"ENERGY": grad_energy is not None}
    drive, logits = launch.drive, launch.logits
    gradient = unit_stride(grad_states)
    weight = alpha if grad_energy is None else grad_energy.contiguous()
    states = states.contiguous()
    grad_beta, grad_modulation, grad_initial = empty_gradients(inputs)
    sums = alpha.new_empty(launch.batch, launch.chunks, 4, launch.width)
    entering = None if grad_final is None else grad_final.contiguous()
    with on_device_of(inputs.beta):
        if launch.chunks > 1:
            product, local = launch.empty_transitions(alpha)
            given = (gradient, weight, states, logits, *launch.base)
            sizes = (*launch.sizes, *strides(gradient, logits))
            triton_backward.reduce_backward[launch.grid](
                *given, product, local, *sizes, **options
            )
            entering = _carry(product, local, entering, reverse=True)
        triton_backward.scan_backward[launch.grid](
            gradient,
            weight,
            alpha if entering is None else entering,
            states,
            drive,
            logits,
            *launch.base,
            alpha if initial is None else initial.contiguous(),
            grad_beta,
            grad_beta if inputs.modulation is None else grad_modulation,
            grad_initial,
            sums,
            *launch.sizes,
            *strides(gradient, drive, logits),
            HAS_INITIAL=initial is not None,
            HAS_ENTERING=entering is not None,
            **options,
            **launch.gain,
        )
    return grad_beta, grad_modulation, sums.sum(dim=(0, 1)), grad_initial


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.input_norm = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_states, grad_final, grad_energy):
    *tensors, states = ctx.saved_tensors
    inputs = ScanInputs(*tensors, ctx.input_norm)
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    grad_beta, grad_modulation, grad_base, grad_initial = _scan_backward(
        grad_states, grad_final, grad_energy, states, *inputs
    )
    return (
        grad_beta,
        grad_base[0],
        grad_base[1],
        grad_base[2:],
        None if inputs.modulation is None else grad_modulation,
        None if inputs.initial_state is None else grad_initial,
        None,
        None,
    )


class _Launch:
    """Grid, sizes, tensors and constants that the kernels of one direction share."""

    def __init__(self, inputs: ScanInputs, unroll: int) -> None:
        self.batch, steps, halves = inputs.beta.shape
        self.width = halves // 2
        chunk = chunk_steps(steps)
        self.chunks = -(-steps // chunk)
        self.sizes = (steps, chunk)
        self.grid = _grid(self.batch, self.width, self.chunks)
        # In place of what there is not, kernels get any tensor, which they do not read.
        self.drive = self.logits = flags = unit_stride(inputs.beta)
        if inputs.modulation is not None:
            self.logits = unit_stride(inputs.modulation)
        if inputs.resets is not None:
            flags = inputs.resets.contiguous().view(torch.uint8)
        base = (inputs.alpha, inputs.omega, inputs.ranges)
        self.base = (flags, *(tensor.contiguous() for tensor in base))
        modulated = inputs.modulation is not None
        self.options = _options(self.width, unroll) | {
            "MODULATED": modulated,
            "RESET": inputs.resets is not None,
        }
        gain = ("none", "static", "dynamic").index(inputs.input_norm)
        # Without modulation, the dynamic gain is the static one.
        self.gain = {"GAIN": gain if modulated else min(gain, 1)}

    def empty_transitions(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the product and the local end state of each chunk, [B, chunks, 2K]."""
        product = like.new_empty(self.batch, self.chunks, 2 * self.width)
        return product, torch.empty_like(product)


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


def strides(*sequences: Tensor) -> list[int]:
    """Strides of batch and time of each."""
    return [stride for sequence in sequences for stride in sequence.stride()[:2]]


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the device of the arguments.
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


register_tracing("ten_dist_triton")
_scan_forward.register_autograd(_backward, setup_context=_save_for_backward)

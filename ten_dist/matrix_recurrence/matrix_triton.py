"""The matrix scan on GPUs: its Triton kernels, launched and registered.

As registered operators with fake implementations they do not break a graph under
`torch.compile`. Triton is imported when the scan first runs, not with this module.

Memory for backward: the arguments. Forward takes, while it runs, 9 float32 numbers for each
step and eigenstate (rotated queries and keys, rotations, sums of logarithms in float64,
squared decays);
backward those, 4 more for each block of N (gradients of queries and keys, and energies where
they have a gradient: 5), and the states at the borders of the chunks, 2 N / CHUNK. Every sum
is taken in one order: repeated runs give the same bits.

Not yet run, nor measured, on a GPU: the tests interpret the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ten_dist.matrix_recurrence.matrix_finite import with_not_a_number
from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.matrix_recurrence.matrix_operator import (
    empty_gradients,
    empty_results,
    register,
)
from ten_dist.recurrence.inputs import unit_stride
from ten_dist.recurrence.triton_scan import on_device_of, strides

CHUNK = 32
"""C, steps of a chunk: a power of two, at least 16."""
STATE_ELEMENTS = 2048
"""Complex numbers of the state that a program holds, at most, where N can be cut that far."""
WARPS = 4
"""Warps of a program in the kernels of matrix products."""
BLOCK = 32
"""Eigenstates of a program in the kernels that go step by step, which have one warp."""
SMALLEST = 16
"""Least size of a matrix that Triton multiplies."""


def triton_matrix_scan(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_scan` for float32, bfloat16 and float16.

    `ten_dist.recurrence.triton_scan.unavailable` is None for the device of `key`.
    """
    initial = inputs.initial_state
    results = _operator(
        *inputs._replace(
            alpha=inputs.alpha.float(),
            omega=inputs.omega.float(),
            ranges=inputs.ranges.float(),
            initial_state=None if initial is None else initial.float(),
        )
    )
    return with_not_a_number(inputs, *results)


def _forward(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    from ten_dist.matrix_recurrence import matrix_triton_forward

    launch = _Launch(inputs)
    initial = inputs.initial_state
    output, final = empty_results(inputs)
    energy = inputs.alpha.new_empty(launch.batch, launch.blocks, launch.width)
    with on_device_of(inputs.key):
        prepared = launch.prepare()
        matrix_triton_forward.scan_forward[launch.grid](
            launch.value,
            *prepared,
            # In place of what there is not, kernels get any tensor, which they do not read.
            inputs.alpha if initial is None else initial.contiguous(),
            output,
            final,
            energy,
            launch.scale,
            *launch.lengths,
            *strides(launch.value),
            LEVELS=CHUNK.bit_length() - 1,
            HAS_INITIAL=initial is not None,
            **launch.products,
        )
    return output, final, energy.sum(dim=1)


def _backward(
    inputs: MatrixScanInputs,
    grad_output: Tensor,
    grad_final: Tensor | None,
    grad_energy: Tensor | None,
) -> tuple[Tensor, ...]:
    from ten_dist.matrix_recurrence import (
        matrix_triton_backward,
        matrix_triton_forward,
        matrix_triton_steps,
    )

    launch = _Launch(inputs)
    alpha, initial = inputs.alpha, inputs.initial_state
    batch, width, chunks = launch.batch, launch.width, launch.chunks
    gradient = unit_stride(grad_output)
    energy_weight = alpha if grad_energy is None else grad_energy.contiguous()
    gradients = empty_gradients(inputs)
    grad_key, grad_query, grad_value, grad_modulation, _, grad_initial = gradients
    states = alpha.new_empty(batch, chunks + 1, 2 * width, inputs.state_dim)
    parts = (launch.blocks, batch, chunks)
    rotated = [alpha.new_empty(*parts, CHUNK, 2 * width) for _ in range(2)]
    crossing = alpha.new_empty(*parts, 2 * width)
    energies = entering_energies = alpha.new_empty(launch.blocks)
    if grad_energy is not None:
        energies = alpha.new_empty(*parts, CHUNK, width)
        entering_energies = alpha.new_empty(*parts, width)
    sums = alpha.new_empty(batch, chunks, 4, width)
    with on_device_of(inputs.key):
        rotated_query, rotated_key, log_decays, squares, turns = launch.prepare()
        matrix_triton_forward.chunk_states[launch.grid](
            launch.value,
            rotated_key,
            log_decays,
            turns,
            alpha if initial is None else initial.contiguous(),
            states,
            *launch.lengths,
            *strides(launch.value),
            HAS_INITIAL=initial is not None,
            **launch.products,
        )
        matrix_triton_backward.scan_backward[launch.grid](
            gradient,
            alpha if grad_final is None else grad_final.contiguous(),
            energy_weight,
            launch.value,
            rotated_query,
            rotated_key,
            log_decays,
            squares,
            turns,
            states,
            *rotated,
            grad_value,
            grad_initial,
            crossing,
            energies,
            entering_energies,
            launch.scale,
            *launch.lengths,
            *strides(gradient, launch.value),
            LEVELS=CHUNK.bit_length() - 1,
            HAS_FINAL=grad_final is not None,
            ENERGY=grad_energy is not None,
            **launch.products,
        )
        added = (*rotated, crossing, energies, entering_energies)
        matrix_triton_steps.finish[launch.grid_of_steps](
            *launch.given,
            rotated_query,
            rotated_key,
            log_decays,
            turns,
            *(part.sum(dim=0) for part in added),
            energy_weight,
            grad_key,
            grad_query,
            grad_modulation,
            sums,
            *launch.step_sizes,
            ENERGY=grad_energy is not None,
            **launch.steps_options,
        )
    grad_base = sums.sum(dim=(0, 1))
    return grad_key, grad_query, grad_value, grad_modulation, grad_base, grad_initial


class _Launch:
    """Grids, sizes, tensors and constants that the kernels share."""

    def __init__(self, inputs: MatrixScanInputs) -> None:
        self.batch, steps, halves = inputs.key.shape
        self.width, heads = halves // 2, inputs.num_heads
        self.chunks = -(-steps // CHUNK)
        self.lengths = (steps, self.chunks)
        self.scale = (self.width // heads) ** -0.5
        self.value = unit_stride(inputs.value)
        sequences = [
            unit_stride(s) for s in (inputs.key, inputs.query, inputs.modulation)
        ]
        self.step_sizes = (steps, *strides(*sequences))
        resets = inputs.starts().contiguous().view(torch.uint8)
        base = (inputs.alpha, inputs.omega, inputs.ranges)
        self.given = (*sequences, resets, *(tensor.contiguous() for tensor in base))

        eigenstates = _power_of_two(self.width // heads)
        columns = max(SMALLEST, STATE_ELEMENTS // eigenstates)
        columns = min(_power_of_two(inputs.state_dim), columns)
        self.blocks = -(-inputs.state_dim // columns)
        self.grid = (self.batch * heads, self.blocks)
        self.grid_of_steps = (self.batch * -(-self.width // BLOCK), self.chunks)
        common: dict[str, Any] = {
            "CHUNK": CHUNK,
            "WIDTH": self.width,
            # Triton 3.10 will not fuse multiplication and addition unless it is told to.
            "enable_fp_fusion": True,
        }
        self.products = common | {
            "NUM_HEADS": heads,
            "STATE_DIM": inputs.state_dim,
            "PRECISION": "ieee" if inputs.key.dtype == torch.float32 else "tf32x3",
            "BLOCK_P": eigenstates,
            "BLOCK_N": columns,
            "num_warps": WARPS,
        }
        self.steps_options = common | {
            "GAIN": ("none", "static", "dynamic").index(inputs.input_norm),
            "BLOCK": BLOCK,
            "num_warps": 1,
        }

    def prepare(self) -> tuple[Tensor, ...]:
        """Rotated queries and keys, sums of logarithms, squared decays, rotations."""
        from ten_dist.matrix_recurrence import matrix_triton_steps

        alpha, width = self.given[4], self.width
        shape = (self.batch, self.chunks, CHUNK)
        query = alpha.new_empty(*shape, 2 * width)
        log_decays = alpha.new_empty(*shape, width, dtype=torch.float64)
        squares = alpha.new_empty(*shape, width)
        key, turns = torch.empty_like(query), torch.empty_like(query)
        prepared = (query, key, log_decays, squares, turns)
        matrix_triton_steps.prepare[self.grid_of_steps](
            *self.given, *prepared, *self.step_sizes, **self.steps_options
        )
        return prepared


def _power_of_two(size: int) -> int:
    """The least power of two of at least `size` and SMALLEST."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


_operator = register("ten_dist_triton::matrix_scan", _forward, _backward)

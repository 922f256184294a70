"""Registered operators of the matrix scan in Python, which a graph of `torch.compile` holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]
_Gradients = tuple[Tensor, ...]

# A schema of an operator has no tuples: it lists the fields of MatrixScanInputs, in their
# order.
_ARGUMENTS = (
    "Tensor key, Tensor query, Tensor value, Tensor alpha, Tensor omega, Tensor ranges, "
    "Tensor modulation, int num_heads, Tensor? initial_state, Tensor? resets, str input_norm"
)


def register(
    name: str,
    forward: Callable[[MatrixScanInputs], tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., _Gradients],
) -> Operator:
    """The operator `name` of the fields of MatrixScanInputs, with alpha, omega, ranges and
    initial state in the state dtype; only the arguments are kept for backward.

    Args:
        forward: gives output, final state and energy.
        backward: of the inputs, and the gradients of output, final state and energy, of which
            the last two may be None, gives what `empty_gradients` has.
    """

    def run_backward(grad_output, grad_final, grad_energy, *arguments):
        inputs = MatrixScanInputs(*arguments)
        return backward(inputs, grad_output, grad_final, grad_energy)

    def fake_forward(*arguments):
        inputs = MatrixScanInputs(*arguments)
        batch, _, halves = inputs.key.shape
        return *empty_results(inputs), inputs.alpha.new_empty(batch, halves // 2)

    def fake_backward(grad_output, grad_final, grad_energy, *arguments):
        return empty_gradients(MatrixScanInputs(*arguments))

    def save(ctx, inputs, output) -> None:
        arguments = MatrixScanInputs(*inputs)
        ctx.num_heads, ctx.input_norm = arguments.num_heads, arguments.input_norm
        ctx.save_for_backward(*arguments[:7], *arguments[8:10])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_output, grad_final, grad_energy):
        saved = ctx.saved_tensors
        inputs = MatrixScanInputs(*saved[:7], ctx.num_heads, *saved[7:], ctx.input_norm)
        if grad_output is None:
            grad_output = torch.zeros_like(inputs.value)
        *projected, grad_modulation, base, initial = backward_operator(
            grad_output, grad_final, grad_energy, *inputs
        )
        grad_initial = None if inputs.initial_state is None else initial
        return (
            *(*projected, base[0], base[1], base[2:], grad_modulation),
            *(None, grad_initial, None, None),
        )

    operator = torch.library.custom_op(
        f"{name}_forward",
        lambda *arguments: forward(MatrixScanInputs(*arguments)),
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    )
    backward_operator = torch.library.custom_op(
        f"{name}_backward",
        run_backward,
        mutates_args=(),
        schema=(
            "(Tensor grad_output, Tensor? grad_final, Tensor? grad_energy, "
            f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
    )
    operator.register_fake(fake_forward)
    backward_operator.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=save)
    return operator


def empty_results(inputs: MatrixScanInputs) -> tuple[Tensor, Tensor]:
    """Memory for the output and the final state."""
    batch, _, halves = inputs.key.shape
    final = inputs.alpha.new_empty(batch, halves * inputs.state_dim)
    return contiguous_like(inputs.value), final


def empty_gradients(inputs: MatrixScanInputs) -> _Gradients:
    """Memory for the gradients of key, query, value and modulation; of alpha, omega and both
    ranges, [4, K]; and of the initial state."""
    sequences = inputs.key, inputs.query, inputs.value, inputs.modulation
    base = inputs.alpha.new_empty(4, inputs.alpha.shape[0])
    return (*map(contiguous_like, sequences), base, empty_results(inputs)[1])


def contiguous_like(tensor: Tensor) -> Tensor:
    """Memory of the shape of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)

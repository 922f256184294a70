"""What the registered operators of the scan lack: shapes for tracing, and autograd.

A namespace registers `scan_forward` and `scan_backward` with torch. Fake implementations
let a graph hold them; autograd is added here where the operators bring none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself where neighbours in its last dimension are neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def register_tracing(namespace: str) -> None:
    """Add fake implementations to `scan_forward` and `scan_backward` of `namespace`."""
    torch.library.register_fake(f"{namespace}::scan_forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::scan_backward", _fake_backward)


def register_autograd(namespace: str) -> None:
    """Make `scan_backward` of `namespace` the backward of its `scan_forward`.

    It is given None for gradients of the final state and of the energy that are missing.
    """
    scan_backward = getattr(torch.ops, namespace).scan_backward

    def save(ctx, inputs, output) -> None:
        *tensors, input_norm = inputs
        ctx.save_for_backward(*tensors, output[0])
        ctx.input_norm = input_norm
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_states, grad_final, grad_energy):
        beta, alpha, omega, ranges, modulation, initial, resets, states = (
            ctx.saved_tensors
        )
        if grad_states is None:
            grad_states = torch.zeros_like(states)
        grad_beta, grad_modulation, grad_base, grad_initial = scan_backward(
            unit_stride(grad_states),
            None if grad_final is None else grad_final.contiguous(),
            None if grad_energy is None else grad_energy.contiguous(),
            states,
            beta,
            alpha,
            omega,
            ranges,
            modulation,
            initial,
            resets,
            ctx.input_norm,
        )
        return (
            grad_beta,
            grad_base[0],
            grad_base[1],
            grad_base[2:],
            grad_modulation if modulation is not None else None,
            grad_initial if initial is not None else None,
            None,
            None,
        )

    torch.library.register_autograd(
        f"{namespace}::scan_forward", backward, setup_context=save
    )


def _fake_forward(beta, alpha, omega, ranges, modulation, initial, resets, input_norm):
    batch, _, width = beta.shape
    return (
        torch.empty_like(beta, memory_format=torch.contiguous_format),
        alpha.new_empty(batch, width),
        alpha.new_empty(batch, width // 2),
    )


def _fake_backward(
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
    batch, _, width = beta.shape
    return (
        torch.empty_like(beta, memory_format=torch.contiguous_format),
        beta.new_empty(0)
        if modulation is None
        else torch.empty_like(modulation, memory_format=torch.contiguous_format),
        alpha.new_empty(4, width // 2),
        alpha.new_empty(batch, width),
    )

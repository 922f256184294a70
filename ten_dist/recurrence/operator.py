"""Shapes of what the registered operators of the scan return, for tracing.

A namespace registers `scan_forward` and `scan_backward` with torch. With these fake
implementations a graph of `torch.compile` holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.recurrence.inputs import ScanInputs


def register_tracing(namespace: str) -> None:
    """Add fake implementations to `scan_forward` and `scan_backward` of `namespace`."""
    torch.library.register_fake(f"{namespace}::scan_forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::scan_backward", _fake_backward)


def empty_states(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Memory for the states and the final state."""
    batch, _, halves = inputs.beta.shape
    return _contiguous_like(inputs.beta), inputs.alpha.new_empty(batch, halves)


def empty_gradients(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of beta, modulation and initial state.

    An operator cannot return None: without a modulation, its gradient has no elements.
    """
    beta, modulation = inputs.beta, inputs.modulation
    return (
        _contiguous_like(beta),
        beta.new_empty(0) if modulation is None else _contiguous_like(modulation),
        inputs.alpha.new_empty(beta.shape[0], beta.shape[2]),
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# A schema of an operator has no tuples: it lists the fields of ScanInputs, in their order.
def _fake_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(*arguments)
    energy = inputs.alpha.new_empty(inputs.beta.shape[0], inputs.alpha.shape[0])
    return *empty_states(inputs), energy


def _fake_backward(
    grad_states: Tensor, grad_final: Tensor, grad_energy: Tensor, states: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = ScanInputs(*rest)
    grad_beta, grad_modulation, grad_initial = empty_gradients(inputs)
    grad_base = inputs.alpha.new_empty(4, inputs.alpha.shape[0])
    return grad_beta, grad_modulation, grad_base, grad_initial

"""The eigenstate scan in pure torch: two levels of blocks, with its own backward.

T steps are cut into about sqrt(T) blocks of about sqrt(T) steps. Inside the blocks the
recurrence runs over all blocks at once, from a zero state, beside the running product
of the eigenvalues; a second loop carries the state from block to block; one fused
operation adds to each step what entered its block. That is 2 sqrt(T) Python steps
instead of T, in O(T) work, and numerically a plain recurrence: no logarithms, no
division by products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ten_dist.recurrence.eigenvalues import (
    EigenvalueTerms,
    eigenvalue_terms,
    entering_state,
    input_gain_derivative,
    state_energy,
    to_complex,
    to_halves,
)
from ten_dist.recurrence.inputs import ScanInputs


def blocked_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` on any device that runs torch, with the energy.

    Kept for backward: the arguments and the returned states, which the caller holds
    anyway. Eigenvalues are computed again in backward.
    """
    states, final_state = _BlockedScan.apply(*inputs)
    return states, final_state, state_energy(states)


class _BlockedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor]:
        """States and final state; `arguments` are the fields of ScanInputs."""
        *tensors, ctx.input_norm = arguments
        inputs = ScanInputs(*arguments).in_state_dtype()
        terms = eigenvalue_terms(inputs)
        drive = to_complex(inputs.beta)
        eigenvalue = _carrying(terms, drive, inputs.resets)
        if terms.gain is not None:
            drive = drive * terms.gain
        scanned = affine_scan(eigenvalue, drive, entering_state(inputs))
        states = to_halves(scanned).to(tensors[0].dtype)
        ctx.save_for_backward(*tensors, states)
        return states, to_halves(scanned[:, -1])

    @staticmethod
    def backward(ctx, grad_states: Tensor, grad_final: Tensor):
        # With w the incoming gradient of the states (real and imaginary parts as one
        # complex number), the adjoint is the reverse recurrence
        #     G_t = w_t + conj(lambda_{t+1}) G_{t+1},
        # and every other gradient follows from G_t and the product
        #     z_t = conj(G_t) lambda_t c_{t-1}.
        # A reset makes lambda_t zero in both: nothing flows back over it either.
        *tensors, states = ctx.saved_tensors
        inputs = ScanInputs._make([*tensors, ctx.input_norm]).in_state_dtype()
        dtype = inputs.beta.dtype
        terms = eigenvalue_terms(inputs)
        drive = to_complex(inputs.beta)
        eigenvalue = _carrying(terms, drive, inputs.resets)
        adjoint = _adjoint(
            eigenvalue, to_complex(grad_states.to(dtype)), to_complex(grad_final)
        )
        entering = entering_state(inputs).unsqueeze(1)
        before = torch.cat([entering, to_complex(states[:, :-1].to(dtype))], dim=1)
        product = adjoint.conj() * eigenvalue * before
        grad_logit = torch.sigmoid(-terms.logit) * product.real
        grad_rotation = -product.imag

        grad_beta = adjoint
        grad_alpha = torch.zeros_like(inputs.alpha)
        if terms.gain is not None:
            grad_beta = adjoint * terms.gain
            grad_gain = (adjoint.conj() * drive).real
            if inputs.input_norm == "dynamic":
                grad_logit = grad_logit + grad_gain * input_gain_derivative(terms.logit)
            else:
                slope = input_gain_derivative(inputs.alpha)
                grad_alpha = (grad_gain * slope).sum(dim=(0, 1))
        grad_alpha = grad_alpha + grad_logit.sum(dim=(0, 1))
        grad_omega = grad_rotation.sum(dim=(0, 1))

        grad_modulation, grad_ranges = None, torch.zeros_like(inputs.ranges)
        if inputs.modulation is not None:
            bounded = torch.tanh(inputs.modulation)
            grad_scaled = torch.cat([grad_logit, grad_rotation], dim=-1)
            grad_ranges = (bounded * grad_scaled).sum(dim=(0, 1)).view_as(grad_ranges)
            grad_modulation = grad_scaled.mul_(inputs.ranges.flatten())
            grad_modulation = grad_modulation.mul_(1 - bounded**2)
        grad_initial = None
        if inputs.initial_state is not None:
            grad_initial = to_halves(eigenvalue[:, 0].conj() * adjoint[:, 0])
        gradients = (
            *(to_halves(grad_beta), grad_alpha, grad_omega),
            *(grad_ranges, grad_modulation, grad_initial),
        )
        converted = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors)
        )
        return *converted, None, None


def affine_scan(coefficient: Tensor, drive: Tensor, entering: Tensor) -> Tensor:
    """c_t = coefficient_t c_{t-1} + drive_t with c_{-1} = entering.

    Args:
        coefficient, drive: [B, T, K] complex.
        entering: [B, K] complex.

    Returns:
        [B, T, K] complex.
    """
    batch, steps, width = drive.shape
    block = math.isqrt(steps - 1) + 1
    blocks = -(-steps // block)
    padding = blocks * block - steps
    if padding:
        filler = drive.new_zeros(batch, padding, width)
        drive = torch.cat([drive, filler], dim=1)
        coefficient = torch.cat([coefficient, filler], dim=1)
    shape = (batch, blocks, block, width)
    drive, coefficient = drive.reshape(shape), coefficient.reshape(shape)

    local = torch.empty_like(drive)
    decay = torch.empty_like(drive)
    local[:, :, 0], decay[:, :, 0] = drive[:, :, 0], coefficient[:, :, 0]
    for step in range(1, block):
        factor = coefficient[:, :, step]
        local[:, :, step] = factor * local[:, :, step - 1] + drive[:, :, step]
        decay[:, :, step] = factor * decay[:, :, step - 1]

    carried = []
    for index in range(blocks):
        carried.append(entering)
        entering = decay[:, index, -1] * entering + local[:, index, -1]
    states = local.addcmul_(decay, torch.stack(carried, dim=1).unsqueeze(2))
    return states.reshape(batch, blocks * block, width)[:, :steps]


def _adjoint(eigenvalue: Tensor, grad_states: Tensor, grad_final: Tensor) -> Tensor:
    """G_t of the module's comment: the same scan on time run backwards.

    The gradient of the final state enters as G_T with a coefficient of 1.
    """
    following = torch.cat(
        [eigenvalue[:, 1:].conj(), torch.ones_like(eigenvalue[:, :1])], dim=1
    )
    reversed_adjoint = affine_scan(
        following.flip(1), grad_states.flip(1), grad_final.contiguous()
    )
    return reversed_adjoint.flip(1)


def _carrying(terms: EigenvalueTerms, drive: Tensor, resets: Tensor | None) -> Tensor:
    """What multiplies the state before each step, [B, T, K]: 0 at a reset."""
    eigenvalue = terms.eigenvalue.expand_as(drive)
    if resets is None:
        return eigenvalue
    return eigenvalue.masked_fill(resets.unsqueeze(-1), 0.0)

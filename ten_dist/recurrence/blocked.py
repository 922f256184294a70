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
    input_gain_derivative,
    state_dtype,
    state_energy,
    to_complex,
    to_halves,
)


def blocked_scan(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` on any device that runs torch.

    Kept for backward: the arguments and the returned states, which the caller holds
    anyway. Eigenvalues are computed again in backward.
    """
    states, final_state = _BlockedScan.apply(
        beta, alpha, omega, modulation, ranges, initial_state, resets, input_norm
    )
    return states, final_state, state_energy(states)


class _BlockedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        beta: Tensor,
        alpha: Tensor,
        omega: Tensor,
        modulation: Tensor | None,
        ranges: Tensor,
        initial_state: Tensor | None,
        resets: Tensor | None,
        input_norm: str,
    ) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(beta)
        terms = _terms(alpha, omega, modulation, ranges, input_norm, dtype)
        drive = to_complex(beta.to(dtype))
        if terms.gain is not None:
            drive = drive * terms.gain
        entering = _initial(initial_state, drive)
        scanned = affine_scan(_carrying(terms, drive, resets), drive, entering)
        final_state = to_halves(scanned[:, -1])
        states = to_halves(scanned).to(beta.dtype)
        ctx.save_for_backward(
            beta, alpha, omega, modulation, ranges, initial_state, resets, states
        )
        ctx.input_norm = input_norm
        return states, final_state

    @staticmethod
    def backward(ctx, grad_states: Tensor, grad_final: Tensor):
        # With w the incoming gradient of the states (real and imaginary parts as one
        # complex number), the adjoint is the reverse recurrence
        #     G_t = w_t + conj(lambda_{t+1}) G_{t+1},
        # and every other gradient follows from G_t and the product
        #     z_t = conj(G_t) lambda_t c_{t-1}.
        # A reset makes lambda_t zero in both: nothing flows back over it either.
        beta, alpha, omega, modulation, ranges, initial_state, resets, states = (
            ctx.saved_tensors
        )
        dtype = state_dtype(beta)
        terms = _terms(alpha, omega, modulation, ranges, ctx.input_norm, dtype)
        drive = to_complex(beta.to(dtype))
        eigenvalue = _carrying(terms, drive, resets)
        adjoint = _adjoint(
            eigenvalue, to_complex(grad_states.to(dtype)), to_complex(grad_final)
        )
        before = torch.cat(
            [
                _initial(initial_state, drive).unsqueeze(1),
                to_complex(states[:, :-1].to(dtype)),
            ],
            dim=1,
        )
        product = adjoint.conj() * eigenvalue * before
        grad_logit = torch.sigmoid(-terms.logit) * product.real
        grad_rotation = -product.imag

        grad_beta = adjoint
        grad_alpha = torch.zeros_like(alpha, dtype=dtype)
        if terms.gain is not None:
            grad_beta = adjoint * terms.gain
            grad_gain = (adjoint.conj() * drive).real
            if ctx.input_norm == "dynamic":
                grad_logit = grad_logit + grad_gain * input_gain_derivative(terms.logit)
            else:
                slope = input_gain_derivative(alpha.to(dtype))
                grad_alpha = (grad_gain * slope).sum(dim=(0, 1))
        grad_alpha = grad_alpha + grad_logit.sum(dim=(0, 1))

        grad_modulation, grad_ranges = None, torch.zeros_like(ranges)
        if modulation is not None:
            bounded = torch.tanh(modulation.to(dtype))
            grad_scaled = torch.cat([grad_logit, grad_rotation], dim=-1)
            grad_ranges = (bounded * grad_scaled).sum(dim=(0, 1)).view_as(ranges)
            grad_modulation = grad_scaled.mul_(ranges.to(dtype).flatten())
            grad_modulation = grad_modulation.mul_(1 - bounded**2).to(modulation.dtype)
        grad_initial = None
        if initial_state is not None:
            grad_initial = to_halves(eigenvalue[:, 0].conj() * adjoint[:, 0])
            grad_initial = grad_initial.to(initial_state.dtype)
        return (
            to_halves(grad_beta).to(beta.dtype),
            grad_alpha.to(alpha.dtype),
            grad_rotation.sum(dim=(0, 1)).to(omega.dtype),
            grad_modulation,
            grad_ranges.to(ranges.dtype),
            grad_initial,
            None,
            None,
        )


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


def _terms(
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
    dtype: torch.dtype,
) -> EigenvalueTerms:
    return eigenvalue_terms(
        alpha.to(dtype),
        omega.to(dtype),
        None if modulation is None else modulation.to(dtype),
        ranges.to(dtype),
        input_norm,
    )


def _carrying(terms: EigenvalueTerms, drive: Tensor, resets: Tensor | None) -> Tensor:
    """What multiplies the state before each step, [B, T, K]: 0 at a reset."""
    eigenvalue = terms.eigenvalue.expand_as(drive)
    if resets is None:
        return eigenvalue
    return eigenvalue.masked_fill(resets.unsqueeze(-1), 0.0)


def _initial(initial_state: Tensor | None, drive: Tensor) -> Tensor:
    if initial_state is None:
        return torch.zeros_like(drive[:, 0])
    return to_complex(initial_state.to(drive.real.dtype))

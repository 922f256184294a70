"""Decay, rotation and input gain of the eigenstates (docs/model.md#scan)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EigenvalueTerms(NamedTuple):
    """What multiplies the state and the input at each step.

    Tensors are [B, T, K], or [K] where they do not depend on the input.
    """

    logit: Tensor
    """Of the decay: alpha with its modulation, real."""
    decay: Tensor
    """rho = sigmoid(logit), real."""
    eigenvalue: Tensor
    """lambda = rho exp(i phi), complex."""
    gain: Tensor | None
    """g, real; None stands for 1."""


def state_dtype(beta: Tensor) -> torch.dtype:
    """Real dtype in which the state of input `beta` is carried."""
    return torch.float64 if beta.dtype == torch.float64 else torch.float32


def eigenvalue_terms(
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
) -> EigenvalueTerms:
    """Terms of the recurrence for base values [K] and modulation [B, T, 2K] or None.

    `ranges` [2, K] are s_a and s_w. All arguments are of one real dtype, which the terms
    have too.
    """
    if modulation is None:
        logit, rotation = alpha, omega
    else:
        p, q = modulation.chunk(2, dim=-1)
        logit = alpha + ranges[0] * torch.tanh(p)
        rotation = omega + ranges[1] * torch.tanh(q)
    decay = torch.sigmoid(logit)
    eigenvalue = torch.polar(decay, rotation.expand_as(decay).contiguous())
    if input_norm == "none":
        gain = None
    else:
        gain = input_gain(alpha if input_norm == "static" else logit)
    return EigenvalueTerms(logit, decay, eigenvalue, gain)


def input_gain(logit: Tensor) -> Tensor:
    """sqrt(1 - rho^2) for rho = sigmoid(logit), exact also where rho is near 1.

    1 - rho is taken as sigmoid(-logit): the difference of two numbers near 1 would
    lose the digits that matter.
    """
    return torch.sqrt(torch.sigmoid(-logit) * (1 + torch.sigmoid(logit)))


def input_gain_derivative(logit: Tensor) -> Tensor:
    """d sqrt(1 - rho^2) / d logit = -rho^2 sqrt((1 - rho) / (1 + rho))."""
    decay = torch.sigmoid(logit)
    return -(decay**2) * torch.sqrt(torch.sigmoid(-logit) / (1 + decay))


def to_complex(halves: Tensor) -> Tensor:
    """[..., 2K] real and imaginary halves to [..., K] complex."""
    real, imaginary = halves.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def to_halves(values: Tensor) -> Tensor:
    """[..., K] complex to [..., 2K] real and imaginary halves."""
    return torch.cat([values.real, values.imag], dim=-1)


def state_energy(states: Tensor) -> Tensor:
    """Sum over time of |c|^2, [B, K], of states [B, T, 2K]; float32 or wider."""
    squares = states.to(state_dtype(states)).square().sum(dim=1)
    real, imaginary = squares.chunk(2, dim=-1)
    return real + imaginary

"""Decay, rotation and input gain of the eigenstates (docs/model.md#scan)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ten_dist.recurrence.inputs import ScanInputs, state_dtype


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


def eigenvalue_terms(inputs: ScanInputs) -> EigenvalueTerms:
    """Terms of the recurrence, in the one real dtype that all of `inputs` have."""
    logit, rotation = logit_and_rotation(inputs)
    decay = torch.sigmoid(logit)
    eigenvalue = torch.polar(decay, rotation.expand_as(decay).contiguous())
    gain = None
    if inputs.input_norm != "none":
        gain = input_gain(inputs.alpha if inputs.input_norm == "static" else logit)
    return EigenvalueTerms(logit, decay, eigenvalue, gain)


def logit_and_rotation(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Logit of the decay, and phi, [B, T, K], or [K] where there is no modulation."""
    if inputs.modulation is None:
        return inputs.alpha, inputs.omega
    p, q = inputs.modulation.chunk(2, dim=-1)
    logit = inputs.alpha + inputs.ranges[0] * torch.tanh(p)
    return logit, inputs.omega + inputs.ranges[1] * torch.tanh(q)


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


def entering_state(inputs: ScanInputs) -> Tensor:
    """[B, K] complex state before the first step."""
    if inputs.initial_state is None:
        return to_complex(torch.zeros_like(inputs.beta[:, 0]))
    return to_complex(inputs.initial_state)


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

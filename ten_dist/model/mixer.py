"""The eigenstate mixer: one TEN at one scale (DESIGN 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.model.initialization import fill_normal, fill_orthonormal
from ten_dist.model.precision import at_least_float32, without_autocast
from ten_dist.recurrence import eigenstate_scan_with_energy, initial_eigenvalues

RECURRENCE_PARAMETERS = ("alpha", "omega", "coupling", "coupling_strength")
"""Parameters of the recurrence: real, computed with in float32, without weight decay."""

COUPLING_STRENGTH = 0.01
GATE_BIAS = -2.0


class EigenstateMixer(nn.Module):
    """u -> sigmoid(W_g u + b_g) * W_out [R Re c ; R Im c], c the scanned eigenstates.

    One weight holds the projections of the input, in this order of rows: W_in (2K),
    W_sel (2K), W_g (d). The coupling R_h = I + eps M_h is linear and constant in time, so
    it is applied to W_out, once a call, and never to activations.

    All parameters are used in this module's own forward: ZeRO-3 gathers a module's own
    parameters just before it.

    Args:
        config: model configuration.
        step: tokens between two calls of this scale, s; memories of the `timescale`
            initialisation are divided by it.
    """

    def __init__(self, config: TemporalEigenstateConfig, step: int = 1) -> None:
        super().__init__()
        self.dim = config.dim
        self.num_eigenstates = config.eigenstates_per_scale
        self.num_heads = config.num_heads
        self.selection_range = config.selection_range
        self.input_norm = config.input_norm
        self.energy_kind = config.energy_kind
        self.scan_backend = config.scan_backend

        width = 2 * self.num_eigenstates
        head = self.num_eigenstates // self.num_heads
        self.input_weight = nn.Parameter(torch.empty(2 * width + self.dim, self.dim))
        self.gate_bias = nn.Parameter(torch.full((self.dim,), GATE_BIAS))
        self.output_weight = nn.Parameter(torch.empty(self.dim, width))
        self.alpha = nn.Parameter(torch.empty(self.num_eigenstates))
        self.omega = nn.Parameter(torch.empty(self.num_eigenstates))
        self.coupling = nn.Parameter(torch.empty(self.num_heads, head, head))
        self.coupling_strength = nn.Parameter(torch.full((1,), COUPLING_STRENGTH))
        self._initialize(config, step)

    @torch.no_grad()
    def _initialize(self, config: TemporalEigenstateConfig, step: int) -> None:
        in_rows, selection_rows, gate_rows = self._split(self.input_weight, dim=0)
        fill_orthonormal(in_rows)
        # Zero: the base eigenvalues are exact at the start, and the gradient of the
        # selection does not vanish because tanh is steepest there.
        selection_rows.zero_()
        fill_normal(gate_rows, 0.02)
        fill_orthonormal(self.output_weight)
        fill_normal(self.coupling, self.num_eigenstates**-0.5)
        alpha, omega = initial_eigenvalues(
            self.num_eigenstates,
            config.eigenvalue_init,
            max(config.max_timescale / step, 2.0),
        )
        self.alpha.copy_(alpha)
        self.omega.copy_(omega)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        width = 2 * self.num_eigenstates
        return values.split([width, width, self.dim], dim=dim)

    def forward(
        self, inputs: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a sequence.

        Args:
            inputs: [B, T, d], layer-normed.
            state: [B, 2K] float32 eigenstates before the first step, or None.

        Returns:
            outputs: [B, T, d].
            energy: scalar float32. Kind `state`: sum over eigenstates of |c|^2, mean
                over batch and time; kind `eigenvalue`: sum of sigmoid(alpha)^2.
            state: [B, 2K] float32 eigenstates after the last step.
        """
        beta, modulation, gate = self._split(
            F.linear(inputs, self.input_weight), dim=-1
        )
        states, state, energy = eigenstate_scan_with_energy(
            beta,
            at_least_float32(self.alpha),
            at_least_float32(self.omega),
            modulation,
            self.selection_range,
            self.input_norm,
            state,
            self.scan_backend,
        )
        outputs = F.linear(states, self._coupled_output_weight())
        gate = torch.sigmoid(gate + self.gate_bias.to(gate.dtype))
        if self.energy_kind == "eigenvalue":
            energy = torch.sigmoid(at_least_float32(self.alpha)).square().sum()
        else:
            energy = energy.sum() / (inputs.shape[0] * inputs.shape[1])
        return gate * outputs, energy, state

    def _coupled_output_weight(self) -> Tensor:
        """W_out [R (+) R], [d, 2K]: coupling by head, real and imaginary half alike."""
        heads, head = self.num_heads, self.num_eigenstates // self.num_heads
        weight = self.output_weight.view(self.dim, 2, heads, head)
        # Element by element in float32: the deviation from the identity is far below
        # the resolution of bfloat16.
        with without_autocast(weight.device):
            mixed = torch.einsum(
                "dphj,hjk->dphk",
                at_least_float32(weight),
                at_least_float32(self.coupling),
            )
            coupled = (
                at_least_float32(weight)
                + at_least_float32(self.coupling_strength) * mixed
            )
        return coupled.reshape(self.dim, 2 * self.num_eigenstates)

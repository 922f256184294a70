"""The eigenstate mixer: one TEN at one scale (docs/model.md#mixer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.eigenstate_module import EigenstateModule
from ten_dist.model.levels import Levels, LevelState
from ten_dist.model.linear import linear
from ten_dist.model.precision import at_least_float32, without_autocast
from ten_dist.model.weight_initialization import fill_normal, fill_orthonormal
from ten_dist.recurrence import (
    ScanInputs,
    eigenstate_scan_with_energy,
    initial_eigenvalues,
)

COUPLING_STRENGTH = 0.01
GATE_BIAS = -2.0


class EigenstateMixer(EigenstateModule):
    """u -> sigmoid(W_g u + b_g) * W_out [R Re c ; R Im c], c the scanned eigenstates.

    With `gate` "state" the gate acts on the eigenstates instead, W_out [R ; R] (s * c)
    with s = silu(W_g u + b_g) in R^2K, as in gated linear units. With levels, what is read
    of them (:mod:`ten_dist.model.levels`) has the place of c.

    One weight holds the projections of the input, in this order of rows: W_in (2K),
    W_sel (2K), W_g (d or 2K). The coupling R_h = I + eps M_h is linear and constant in time, so
    it is applied to W_out, once a call, and never to activations.

    Args:
        config: model configuration.
        layer: index of the layer, from 0, for its initial memories.
        step: tokens between two calls of this scale, s; memories of the `timescale`
            initialisation are divided by it.
    """

    def __init__(
        self, config: TemporalEigenstateConfig, layer: int = 0, step: int = 1
    ) -> None:
        super().__init__(config, step, config.eigenstates_per_scale)
        self.gates_state = config.gate == "state"

        width = 2 * self.num_eigenstates
        head = self.num_eigenstates // self.num_heads
        gate_width = width if self.gates_state else self.dim
        self.projections = {"input": width, "selection": width, "gate": gate_width}
        self.input_weight = nn.Parameter(torch.empty(2 * width + gate_width, self.dim))
        self.gate_bias = nn.Parameter(torch.empty(gate_width))
        self.output_weight = nn.Parameter(torch.empty(self.dim, width))
        alpha, omega = initial_eigenvalues(
            self.num_eigenstates,
            config.eigenvalue_init,
            max(config.longest_memory(layer) / step, 2.0),
        )
        self._add_eigenvalues(alpha, omega, config.learnable_selection_range)
        self.coupling = nn.Parameter(torch.empty(self.num_heads, head, head))
        self.coupling_strength = nn.Parameter(torch.full((1,), COUPLING_STRENGTH))
        self.levels = None if config.levels is None else Levels(config)
        self.matrix_rows = {
            "input_weight": tuple(self.projections.values()),
            "output_weight": (self.dim,),
        }
        self._frozen_output_weight: Tensor | None = None
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        in_rows, selection_rows, gate_rows = self._split(self.input_weight, dim=0)
        fill_orthonormal(in_rows)
        # Zero: the base eigenvalues are exact at the start, and the gradient of the
        # selection does not vanish because tanh is steepest there.
        selection_rows.zero_()
        if self.gates_state:
            fill_normal(gate_rows, self.dim**-0.5)
            self.gate_bias.zero_()
        else:
            fill_normal(gate_rows, 0.02)
            self.gate_bias.fill_(GATE_BIAS)
        fill_orthonormal(self.output_weight)
        fill_normal(self.coupling, self.num_eigenstates**-0.5)

    def forward(
        self,
        inputs: Tensor,
        state: Tensor | LevelState | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | LevelState]:
        """Mix a sequence.

        Args:
            inputs: [B, T, d], layer-normed.
            state: [B, 2K] float32 eigenstates before the first step, with levels those of
                each, or None.
            resets: [B, T] bool, steps before which the eigenstates are dropped.

        Returns:
            outputs: [B, T, d].
            energy: scalar float32. Kind `state`: sum over eigenstates of |c|^2, mean
                over batch and time; kind `eigenvalue`: sum of sigmoid(alpha)^2.
            state: eigenstates after the last step, as before the first.
        """
        beta, modulation, gate = self._split(linear(inputs, self.input_weight), dim=-1)
        scan = ScanInputs(
            *(beta, self.alpha, self.omega, self._ranges()),
            *(modulation, None, resets, self.input_norm),
        )
        if self.levels is None:
            assert not isinstance(state, LevelState), "no levels"
            scan = scan._replace(initial_state=state)
            states, state, energy = eigenstate_scan_with_energy(scan, self.scan_backend)
        else:
            states, state, energy = self.levels(inputs, scan, state, self.scan_backend)
        gate = gate + self.gate_bias.to(gate.dtype)
        weight = self.coupled_output_weight()
        if self.gates_state:
            outputs = linear(F.silu(gate) * states, weight)
        else:
            outputs = torch.sigmoid(gate) * linear(states, weight)
        energy = self._mean_energy(energy, inputs.shape[0] * inputs.shape[1])
        return outputs, energy, state

    def read_sizes(self) -> Tensor:
        """[K] float64, the norm of W_out of each eigenstate."""
        weight = self.coupled_output_weight().unflatten(1, (2, -1))
        return weight.double().square().sum(dim=(0, 1)).sqrt()

    def freeze(self, dtype: torch.dtype) -> None:
        """Compute W_out [R (+) R] once and for all, and keep it in `dtype`: for one token
        it is as much work as all else."""
        self._frozen_output_weight = self.coupled_output_weight().to(dtype)

    def coupled_output_weight(self) -> Tensor:
        """W_out [R (+) R], [d, 2K]: coupling by head, real and imaginary half alike."""
        if self._frozen_output_weight is not None:
            return self._frozen_output_weight
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

"""The eigenstate mixer: one TEN at one scale (docs/model.md#mixer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.levels import Levels, LevelState
from ten_dist.model.linear import linear
from ten_dist.model.precision import at_least_float32, without_autocast
from ten_dist.model.weight_initialization import fill_normal, fill_orthonormal
from ten_dist.recurrence import (
    ScanInputs,
    as_ranges,
    eigenstate_scan_with_energy,
    initial_eigenvalues,
)

RECURRENCE_PARAMETERS = (
    "alpha_offset",
    "omega_offset",
    "selection",
    "coupling",
    "coupling_strength",
)
"""Parameters of the recurrence: real, computed with in float32, without weight decay."""

COUPLING_STRENGTH = 0.01
GATE_BIAS = -2.0


class EigenstateMixer(nn.Module):
    """u -> sigmoid(W_g u + b_g) * W_out [R Re c ; R Im c], c the scanned eigenstates.

    With `gate` "state" the gate acts on the eigenstates instead, W_out [R ; R] (s * c)
    with s = silu(W_g u + b_g) in R^2K, as in gated linear units. With levels, what is read
    of them (:mod:`ten_dist.model.levels`) has the place of c.

    One weight holds the projections of the input, in this order of rows: W_in (2K),
    W_sel (2K), W_g (d or 2K). The coupling R_h = I + eps M_h is linear and constant in time, so
    it is applied to W_out, once a call, and never to activations.

    alpha and omega are the sum of a float32 buffer, their initial value, and a learned
    offset that starts at zero. Training in which parameters are bfloat16 then rounds the
    offset alone: near 2 pi, neighbouring bfloat16 numbers are 0.03 radians apart.

    All parameters are used in this module's own forward: ZeRO-3 gathers a module's own
    parameters just before it.

    Args:
        config: model configuration.
        layer: index of the layer, from 0, for its initial memories.
        step: tokens between two calls of this scale, s; memories of the `timescale`
            initialisation are divided by it.
    """

    # DeepSpeed reads this name: these buffers stay float32 where parameters do not.
    _keep_in_fp32_modules_strict = ("alpha_base", "omega_base")
    alpha_base: Tensor
    omega_base: Tensor

    def __init__(
        self, config: TemporalEigenstateConfig, layer: int = 0, step: int = 1
    ) -> None:
        super().__init__()
        self.dim = config.dim
        self.step = step
        self.num_eigenstates = config.eigenstates_per_scale
        self.num_heads = config.num_heads
        self.gates_state = config.gate == "state"
        self.selection_range = config.selection_range
        self.input_norm = config.input_norm
        self.energy_kind = config.energy_kind
        self.scan_backend = config.scan_backend

        width = 2 * self.num_eigenstates
        head = self.num_eigenstates // self.num_heads
        gate_width = width if self.gates_state else self.dim
        self.input_weight = nn.Parameter(torch.empty(2 * width + gate_width, self.dim))
        self.gate_bias = nn.Parameter(torch.empty(gate_width))
        self.output_weight = nn.Parameter(torch.empty(self.dim, width))
        alpha, omega = initial_eigenvalues(
            self.num_eigenstates,
            config.eigenvalue_init,
            max(config.longest_memory(layer) / step, 2.0),
        )
        self.alpha_offset = nn.Parameter(torch.zeros(self.num_eigenstates))
        self.omega_offset = nn.Parameter(torch.zeros(self.num_eigenstates))
        self.register_buffer("alpha_base", alpha.to(self.alpha_offset.device))
        self.register_buffer("omega_base", omega.to(self.omega_offset.device))
        if config.learnable_selection_range:
            self.selection = nn.Parameter(torch.empty(2, self.num_eigenstates))
        else:
            self.register_parameter("selection", None)
        self.coupling = nn.Parameter(torch.empty(self.num_heads, head, head))
        self.coupling_strength = nn.Parameter(torch.full((1,), COUPLING_STRENGTH))
        self.levels = None if config.levels is None else Levels(config)
        self.matrix_rows = {
            "input_weight": (width, width, gate_width),
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
        if self.selection is not None:
            for row, initial in zip(self.selection, self.selection_range):
                row.fill_(initial)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        width = 2 * self.num_eigenstates
        return values.split([width, width, values.shape[dim] - 2 * width], dim=dim)

    @property
    def alpha(self) -> Tensor:
        """[K] logits of the base decay, at least float32."""
        return self.alpha_base + at_least_float32(self.alpha_offset)

    @property
    def omega(self) -> Tensor:
        """[K] base rotation, radians a step, at least float32."""
        return self.omega_base + at_least_float32(self.omega_offset)

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
        alpha = self.alpha
        if self.selection is None:
            ranges = as_ranges(self.selection_range, alpha)
        else:
            ranges = at_least_float32(self.selection)
        scan = ScanInputs(
            beta, alpha, self.omega, ranges, modulation, None, resets, self.input_norm
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
        if self.energy_kind == "eigenvalue":
            energy = torch.sigmoid(alpha).square().sum()
        else:
            energy = energy.sum() / (inputs.shape[0] * inputs.shape[1])
        return outputs, energy, state

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

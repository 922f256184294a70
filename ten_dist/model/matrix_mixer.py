"""The matrix mixer: eigenstates that carry vectors, at one scale (docs/model.md#matrix-states)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.matrix_recurrence import MatrixScanInputs, matrix_scan
from ten_dist.model.eigenstate_module import EigenstateModule
from ten_dist.model.linear import linear
from ten_dist.model.mixer import EigenstateMixer
from ten_dist.model.precision import at_least_float32
from ten_dist.model.weight_initialization import fill_normal, fill_orthonormal
from ten_dist.recurrence import initial_eigenvalues

NORM_EPSILON = 1e-5


class MatrixMixer(EigenstateModule):
    """u -> W_out (silu(W_g u + b_g) * RMSNorm_h(o)), o what queries read of the eigenstates.

    Each of the K eigenstates carries `state_dim` N numbers, into which a key writes the
    values of its head (:func:`ten_dist.matrix_recurrence.matrix_scan`): it can hold what
    belongs to what, where one number sums up everything. The norm is of the N values of each head, without
    weights, which W_out has.

    One weight holds the projections of the input, in this order of rows: keys (2K),
    modulation (2K), queries (2K), values (H N), W_g (H N).

    Args:
        config: model configuration.
        layer: index of the layer, from 0, for its initial memories.
        step: tokens between two calls of this scale, s.
    """

    def __init__(
        self, config: TemporalEigenstateConfig, layer: int = 0, step: int = 1
    ) -> None:
        super().__init__(config, step, config.eigenstates_per_scale_of(layer))
        assert config.state_dim is not None, "a matrix layer carries vectors"
        self.state_dim = config.state_dim
        width, values = 2 * self.num_eigenstates, self.num_heads * self.state_dim
        self.projections = {"input": width, "selection": width, "query": width}
        self.projections |= {"value": values, "gate": values}
        rows = tuple(self.projections.values())
        self.input_weight = nn.Parameter(torch.empty(sum(rows), self.dim))
        self.gate_bias = nn.Parameter(torch.zeros(values))
        self.output_weight = nn.Parameter(torch.empty(self.dim, values))
        alpha, omega = initial_eigenvalues(
            self.num_eigenstates,
            config.eigenvalue_init,
            max(config.longest_memory(layer) / step, 2.0),
        )
        # Every head has memories of all lengths. Nothing rotates at first: a query finds
        # what a key wrote however long ago that was.
        alpha = alpha.unflatten(0, (-1, self.num_heads)).T.flatten()
        self._add_eigenvalues(
            alpha, torch.zeros_like(omega), config.learnable_selection_range
        )
        self.matrix_rows = {"input_weight": rows, "output_weight": (self.dim,)}
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        for name in ("input", "query", "value"):
            fill_orthonormal(self.input_weight[self.rows_of(name)])
        self.input_weight[self.rows_of("selection")].zero_()
        fill_normal(self.input_weight[self.rows_of("gate")], self.dim**-0.5)
        fill_orthonormal(self.output_weight)

    def forward(
        self,
        inputs: Tensor,
        state: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a sequence.

        Args:
            inputs: [B, T, d], layer-normed.
            state: [B, 2K N] float32 eigenstates before the first step, or None.
            resets: [B, T] bool, steps before which the eigenstates are dropped.

        Returns:
            outputs: [B, T, d].
            energy: scalar float32. Kind `state`: sum over eigenstates of |S_k|^2 / N, mean
                over batch and time; kind `eigenvalue`: sum of sigmoid(alpha)^2.
            state: [B, 2K N] float32 eigenstates after the last step.
        """
        key, modulation, query, value, gate = self._split(
            linear(inputs, self.input_weight), dim=-1
        )
        scanned = MatrixScanInputs(
            *(key, query, value, self.alpha, self.omega, self._ranges()),
            *(modulation, self.num_heads, state, resets, self.input_norm),
        )
        read, state, energy = matrix_scan(scanned, self.scan_backend)
        heads = at_least_float32(read).unflatten(-1, (self.num_heads, -1))
        normed = F.rms_norm(heads, (self.state_dim,), eps=NORM_EPSILON).flatten(-2)
        gate = F.silu(gate + self.gate_bias.to(gate.dtype))
        outputs = linear(gate * normed.to(gate.dtype), self.output_weight)
        entries = inputs.shape[0] * inputs.shape[1] * self.state_dim
        return outputs, self._mean_energy(energy, entries), state

    def read_sizes(self) -> Tensor:
        """[K] float64, the norm of the weights of the query of each eigenstate."""
        weight = self.input_weight[self.rows_of("query")].unflatten(0, (2, -1))
        return weight.double().square().sum(dim=(0, 2)).sqrt()


def make_mixer(
    config: TemporalEigenstateConfig, layer: int, step: int = 1
) -> EigenstateModule:
    """The mixer of eigenstates of a layer, from 0, at a scale of `step` tokens."""
    kind = MatrixMixer if config.carries_matrices(layer) else EigenstateMixer
    return kind(config, layer, step)

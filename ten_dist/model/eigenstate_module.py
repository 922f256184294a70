"""What every mixer of eigenstates has: eigenvalues with what they learn, and an energy."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.precision import at_least_float32
from ten_dist.recurrence import as_ranges

RECURRENCE_PARAMETERS = (
    "alpha_offset",
    "omega_offset",
    "selection",
    "coupling",
    "coupling_strength",
)
"""Parameters of the recurrence: real, computed with in float32, without weight decay."""


class EigenstateModule(nn.Module, abc.ABC):
    """K eigenstates at one scale of one layer.

    alpha and omega are the sum of a float32 buffer, their initial value, and a learned
    offset that starts at zero. Training in which parameters are bfloat16 then rounds the
    offset alone: near 2 pi, neighbouring bfloat16 numbers are 0.03 radians apart.

    A mixer is one module with all its parameters, this one its base class: ZeRO-3 gathers
    a module's own parameters just before its forward.

    Args:
        config: model configuration.
        step: tokens between two calls of this scale, s.
        num_eigenstates: K.
    """

    # DeepSpeed reads this name: these buffers stay float32 where parameters do not.
    _keep_in_fp32_modules_strict = ("alpha_base", "omega_base")
    alpha_base: Tensor
    omega_base: Tensor
    selection: nn.Parameter | None
    projections: dict[str, int]
    """Rows of each projection in `input_weight`, in their order."""
    input_weight: nn.Parameter
    gate_bias: nn.Parameter
    matrix_rows: dict[str, tuple[int, ...]]

    def __init__(
        self, config: TemporalEigenstateConfig, step: int, num_eigenstates: int
    ) -> None:
        super().__init__()
        self.dim = config.dim
        self.step = step
        self.num_eigenstates = num_eigenstates
        self.num_heads = config.num_heads
        self.selection_range = config.selection_range
        self.input_norm = config.input_norm
        self.energy_kind = config.energy_kind
        self.scan_backend = config.scan_backend

    def _add_eigenvalues(
        self, alpha: Tensor, omega: Tensor, learn_ranges: bool
    ) -> None:
        """Make the parameters of eigenvalues that start at alpha and omega, [K]."""
        width = self.num_eigenstates
        self.alpha_offset = nn.Parameter(torch.zeros(width))
        self.omega_offset = nn.Parameter(torch.zeros(width))
        self.register_buffer("alpha_base", alpha.to(self.alpha_offset.device))
        self.register_buffer("omega_base", omega.to(self.omega_offset.device))
        if not learn_ranges:
            self.register_parameter("selection", None)
            return
        self.selection = nn.Parameter(torch.empty(2, width))
        with torch.no_grad():
            for row, initial in zip(self.selection, self.selection_range):
                row.fill_(initial)

    @property
    def alpha(self) -> Tensor:
        """[K] logits of the base decay, at least float32."""
        return self.alpha_base + at_least_float32(self.alpha_offset)

    @property
    def omega(self) -> Tensor:
        """[K] base rotation, radians a step, at least float32."""
        return self.omega_base + at_least_float32(self.omega_offset)

    def _ranges(self) -> Tensor:
        """[2, K] largest change of alpha and of omega, at least float32."""
        if self.selection is None:
            return as_ranges(self.selection_range, self.alpha_base)
        return at_least_float32(self.selection)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        """What each of the projections gave, or its rows, in their order."""
        return values.split(list(self.projections.values()), dim=dim)

    def rows_of(self, projection: str) -> slice:
        """The rows of one projection in `input_weight`."""
        names = list(self.projections)
        rows = list(self.projections.values())
        first = sum(rows[: names.index(projection)])
        return slice(first, first + self.projections[projection])

    @abc.abstractmethod
    def read_sizes(self) -> Tensor:
        """[K] float64, the norm of the weights through which each eigenstate is read."""

    def _mean_energy(self, energy: Tensor, entries: int) -> Tensor:
        """The scalar of the loss, float32: kind `state`: the sum over eigenstates of the
        energy [B, K] of a scan, over `entries`; kind `eigenvalue`: the sum of
        sigmoid(alpha)^2."""
        if self.energy_kind == "eigenvalue":
            return torch.sigmoid(self.alpha).square().sum()
        return energy.sum() / entries

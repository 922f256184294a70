"""Layers that the baselines share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.model.linear import linear
from ten_dist.model.weight_initialization import OwnValues, fill_normal

STD = 0.02
"""Standard deviation of the initial values of matrices."""


class Projection(OwnValues, nn.Linear):
    """A linear map without bias, or several of one input, one below the other.

    Args:
        in_features: width of the input.
        rows: of each map.
        std: standard deviation of the initial values.
    """

    def __init__(self, in_features: int, *rows: int, std: float = STD) -> None:
        super().__init__(in_features, sum(rows), bias=False)
        self.matrix_rows = {"weight": rows}
        fill_normal(self.weight, std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., sum of rows]."""
        return linear(inputs, self.weight)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202, equation 6)."""

    def __init__(self, dim: int, hidden: int, std: float) -> None:
        super().__init__()
        self.up = Projection(dim, hidden, hidden)
        self.down = Projection(hidden, dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, up = self.up(inputs).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

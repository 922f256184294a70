"""Causal self-attention with rotary positions and normed queries and keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.layers import Projection
from ten_dist.model.attention import rotate


class Attention(nn.Module):
    """o_t = W_o sum_{s<=t} softmax_s(q_t . k_s / sqrt(e)) v_s, H heads of width e.

    q and k are RMS-normed over each head with a learned scale (query-key normalization,
    Henry et al., arXiv 2010.04245, in the form of Dehghani et al., arXiv 2302.05442, section
    2.2), then rotated (RoFormer, Su et al., arXiv 2104.09864, equation 16).

    Args:
        dim: width d.
        num_heads: H, which divides d into an even e.
        std: of the initial output matrix.
    """

    def __init__(self, dim: int, num_heads: int, std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.input = Projection(dim, dim, dim, dim)
        self.query_norm = nn.RMSNorm(dim // num_heads)
        self.key_norm = nn.RMSNorm(dim // num_heads)
        self.output = Projection(dim, dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        query, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.input(inputs).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(self.query_norm(query.float()), 0).to(values.dtype),
            rotate(self.key_norm(keys.float()), 0).to(values.dtype),
            values,
            is_causal=True,
        )
        return self.output(mixed.transpose(1, 2).flatten(-2))

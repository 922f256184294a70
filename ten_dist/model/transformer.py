"""A plain, good transformer of the same shape: the baseline to compare with.

Pre-norm blocks of causal attention (torch's scaled_dot_product_attention, rotary
position embedding) and the MLP, embedding, tied head and loss of the eigenstate network,
so that a comparison measures the mixer and nothing else.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.errors import ConfigurationError
from ten_dist.model.block import FeedForward
from ten_dist.model.initialization import fill_normal
from ten_dist.model.loss import combine_losses
from ten_dist.model.network import TiedHead, TokenEmbedding

ROTARY_BASE = 10000.0


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the positions up to each one, rotary embedding."""

    def __init__(self, dim: int, num_heads: int, n_layers: int) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 2:
            raise ConfigurationError(
                f"dim {dim} must divide over {num_heads} attention heads of even width"
            )
        self.num_heads = num_heads
        self.input_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.output_weight = nn.Parameter(torch.empty(dim, dim))
        fill_normal(self.input_weight, 0.02)
        fill_normal(self.output_weight, 0.02 / (2 * n_layers) ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        projected = F.linear(inputs, self.input_weight)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in projected.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True
        )
        return F.linear(mixed.transpose(1, 2).flatten(-2), self.output_weight)


def rotate(heads: Tensor) -> Tensor:
    """Rotary position embedding of [B, H, T, e], e even, at positions 0 to T - 1."""
    steps, half = heads.shape[2], heads.shape[3] // 2
    frequency = ROTARY_BASE ** (
        -torch.arange(half, device=heads.device, dtype=torch.float32) / half
    )
    position = torch.arange(steps, device=heads.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cosine, sine = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat(
        [first * cosine - second * sine, second * cosine + first * sine], dim=-1
    )


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TemporalEigenstateConfig, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = CausalSelfAttention(config.dim, num_heads, config.n_layers)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Transformer(nn.Module):
    """Decoder-only language model with the interface of the eigenstate network.

    Args:
        config: vocab_size, dim, n_layers, ffn_multiplier and z_loss_weight are used.
        num_heads: attention heads.
    """

    def __init__(self, config: TemporalEigenstateConfig, num_heads: int) -> None:
        super().__init__()
        self.config = dataclasses.replace(config, hten_scales=None)
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, num_heads) for _ in range(config.n_layers)
        )
        self.final_norm = nn.LayerNorm(config.dim)
        self.head = TiedHead(self.embedding)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits [B, T, V] of ids [B, T], or with `targets` the dict of losses."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.final_norm(hidden)
        if targets is None:
            return self.head(hidden)
        token_loss, z_loss = self.head(hidden, targets, self.config.z_loss_weight)
        z_loss = z_loss if self.config.z_loss_weight else None
        return combine_losses(token_loss, torch.zeros_like(token_loss), 0.0, z_loss)

    def compute_loss(
        self, inputs: Tensor, targets: Tensor, return_dict: bool = True
    ) -> dict[str, Tensor] | Tensor:
        """Losses of a batch [B, T], those of the eigenstate network; no energy."""
        losses = self(inputs, targets=targets)
        return losses if return_dict else losses["loss"]

    def num_parameters(self) -> int:
        """Number of parameters, the tied weight once."""
        return sum(p.numel() for p in self.parameters())

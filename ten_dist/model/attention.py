"""Causal self-attention in the place of the eigenstate mixer: the baseline.

With `mixer` "attention" a network is a plain, good transformer: torch's
scaled_dot_product_attention with rotary position embedding (RoFormer, Su et al. 2021)
between the same norms, MLP, embedding, head, loss and trainer, so that a comparison
measures the mixer and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.document_starts import document_numbers
from ten_dist.model.linear import linear
from ten_dist.model.precision import at_least_float32
from ten_dist.model.weight_initialization import fill_normal

ROTARY_BASE = 10000.0


class AttentionState(NamedTuple):
    """Keys and values of all tokens so far: unlike eigenstates, they grow with them."""

    keys: Tensor
    """[B, H, T, d/H], rotated."""
    values: Tensor
    """[B, H, T, d/H]."""
    documents: Tensor | None = None
    """[B, T] int64, the number of each token's document, where documents are masked."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the positions up to each one.

    With document masking, over those of its document: the mask is then block-diagonal,
    and held as [B, 1, T, T]. Rotary positions stay those of the row; products depend on
    their differences alone.

    Args:
        config: dim, num_heads and n_layers are used.
    """

    def __init__(self, config: TemporalEigenstateConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.input_weight = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        self.output_weight = nn.Parameter(torch.empty(config.dim, config.dim))
        self.matrix_rows = {
            "input_weight": (config.dim,) * 3,
            "output_weight": (config.dim,),
        }
        fill_normal(self.input_weight, 0.02)
        fill_normal(self.output_weight, 0.02 / (2 * config.n_layers) ** 0.5)

    def forward(
        self,
        inputs: Tensor,
        state: AttentionState | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """Mix a sequence, or a piece of one.

        Args:
            inputs: [B, T, d], layer-normed.
            state: what the pieces before it left, or None at the start.
            resets: [B, T] bool, where documents start, to keep them apart.

        Returns:
            outputs: [B, T, d]; energy: a float32 zero, attention has no eigenstates;
            state: for the piece that follows.
        """
        query, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in linear(inputs, self.input_weight).chunk(3, dim=-1)
        )
        position = 0 if state is None else state.keys.shape[2]
        query, keys = rotate(query, position), rotate(keys, position)
        if state is not None:
            keys = torch.cat([state.keys, keys], dim=2)
            values = torch.cat([state.values, values], dim=2)
        documents, mask = None, None
        if resets is not None:
            documents, mask = _document_mask(resets, state)
        elif state is not None:
            # Imported here: with it comes torch's compiler, which takes seconds.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(query.shape[2], keys.shape[2])
        mixed = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None
        )
        outputs = linear(mixed.transpose(1, 2).flatten(-2), self.output_weight)
        energy = at_least_float32(inputs.new_zeros(()))
        return outputs, energy, AttentionState(keys, values, documents)


def _document_mask(
    resets: Tensor, state: AttentionState | None
) -> tuple[Tensor, Tensor]:
    """Document numbers [B, S] of all S tokens so far, and what each of the last T sees,
    [B, 1, T, S] bool: the tokens of its document up to itself."""
    numbers = own = document_numbers(resets)
    if state is not None and state.documents is not None:
        own = own + state.documents[:, -1:]
        numbers = torch.cat([state.documents, own], dim=1)
    same = own.unsqueeze(2) == numbers.unsqueeze(1)
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=resets.device).tril(
        same.shape[2] - same.shape[1]
    )
    return numbers, (same & causal).unsqueeze(1)


def rotate(heads: Tensor, position: int) -> Tensor:
    """Rotary position embedding of [B, H, T, e], e even, from `position` on."""
    steps, half = heads.shape[2], heads.shape[3] // 2
    frequency = ROTARY_BASE ** (
        -torch.arange(half, device=heads.device, dtype=torch.float32) / half
    )
    index = torch.arange(
        position, position + steps, device=heads.device, dtype=torch.float32
    )
    angle = index[:, None] * frequency
    cosine, sine = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat(
        [first * cosine - second * sine, second * cosine + first * sine], dim=-1
    )

"""One block: mixer and MLP, each normed before and added after."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.attention import AttentionState, CausalSelfAttention
from ten_dist.model.eigenstate_module import EigenstateModule
from ten_dist.model.hierarchy import HierarchicalMixer, HierarchyState
from ten_dist.model.levels import LevelState
from ten_dist.model.linear import linear
from ten_dist.model.matrix_mixer import make_mixer
from ten_dist.model.short_convolution import ShortConvolution
from ten_dist.model.weight_initialization import OwnValues, fill_normal


class BlockState(NamedTuple):
    """What a block carries from piece to piece of a sequence."""

    mixer: Tensor | LevelState | HierarchyState | AttentionState
    """Eigenstates [B, 2K], or [B, 2K state_dim], of a TEN block, or the state of its
    levels, hierarchy or attention."""
    past: Tensor | None
    """[B, width - 1, d], last inputs of the short convolution, where there is one."""


class Projection(OwnValues, nn.Linear):
    """A linear layer started at N(0, std^2) with zero bias."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        super().__init__(in_features, out_features)
        self.matrix_rows: dict[str, tuple[int, ...]] = {"weight": (out_features,)}
        fill_normal(self.weight, std)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(inputs, self.weight, self.bias)


class FeedForward(nn.Module):
    """MLP d -> ffn_dim -> d: W_down silu(W_up x), or with `ffn_gate` SwiGLU,
    W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202, equation 6), with biases."""

    def __init__(self, config: TemporalEigenstateConfig) -> None:
        super().__init__()
        self.gated = config.ffn_gate
        # W_gate and W_up one above the other: one product, one copy of its input.
        width = 2 * config.ffn_dim if self.gated else config.ffn_dim
        self.up = Projection(config.dim, width, std=0.02)
        if self.gated:
            self.up.matrix_rows = {"weight": (config.ffn_dim, config.ffn_dim)}
        # 2 n_layers branches add to the residual stream: its variance at the start
        # does not grow with depth.
        std = 0.02 / math.sqrt(2 * config.n_layers)
        self.down = Projection(config.ffn_dim, config.dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        hidden = self.up(inputs)
        if not self.gated:
            return self.down(F.silu(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + dropout(mixer(norm(x))), then x + dropout(mlp(norm(x))).

    A short convolution, where the configuration has one, stands between the norm and the
    mixer, at the rate of the tokens for all scales of a hierarchy.
    """

    def __init__(self, config: TemporalEigenstateConfig, layer: int = 0) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.dim)
        self.convolution = None
        if config.short_convolution:
            self.convolution = ShortConvolution(config.dim, config.short_convolution)
        self.mixer: CausalSelfAttention | EigenstateModule | HierarchicalMixer
        if config.mixer == "attention":
            self.mixer = CausalSelfAttention(config)
        elif config.hten_scales is None:
            self.mixer = make_mixer(config, layer)
        else:
            self.mixer = HierarchicalMixer(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        state: BlockState | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, BlockState]:
        """Transform the residual stream.

        Args:
            hidden: [B, T, d].
            state: state of the block before the first position, or None.
            resets: [B, T] bool, positions where a document starts that sees nothing of
                what was before it, or None.

        Returns:
            hidden: [B, T, d]; energy: scalar float32 of the mixer; state: of the block
            after the last position.
        """
        mixer_state, past = state if state is not None else (None, None)
        inputs = self.mixer_norm(hidden)
        if self.convolution is not None:
            inputs, past = self.convolution(inputs, past, resets)
        mixed, energy, mixer_state = self.mixer(inputs, mixer_state, resets)
        hidden = hidden + self.dropout(mixed)
        hidden = hidden + self.dropout(
            self.feed_forward(self.feed_forward_norm(hidden))
        )
        return hidden, energy, BlockState(mixer_state, past)

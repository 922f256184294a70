"""Network of the baselines: embedding, blocks of a mixer and an MLP, final norm, tied head."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from torch import Tensor, nn

from benchmarks.baselines.attention import Attention
from benchmarks.baselines.layers import STD, SwiGLU
from benchmarks.baselines.matrix_states import GatedDeltaNet, Mamba2
from benchmarks.baselines.min_gru import MinGRU
from ten_dist.model.network import TiedHead, TokenEmbedding
from ten_dist.model.short_convolution import ShortConvolution
from ten_dist.model.trainable_model import TrainableModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Shape of a baseline."""

    mixer: Literal["attention", "min_gru", "mamba2", "delta_net"]
    dim: int
    """Width d of the residual stream."""
    n_layers: int
    ffn_dim: int
    """Hidden width of the gated MLP of each block; 0 for blocks without one."""
    num_heads: int = 4
    """Heads of attention and of matrix states; minGRU has none."""
    inner_dim: int = 0
    """States of minGRU, or values of all heads of a layer of matrix states."""
    state_dim: int = 0
    """Rows of the matrix that each head of matrix states holds."""
    convolution: int = 0
    """Tokens that a causal convolution before attention or minGRU sees, 0 for none; where
    matrix states are, 4 are seen by one after their projections."""
    negative_eigenvalues: bool = False
    """Let gated delta net turn a key's content over, not only forget it."""
    vocab_size: int = 0


class Baseline(TrainableModel):
    """A language model of RMS-normed residual blocks."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.dim)
        self.head = TiedHead(self.embedding)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits of the next token at each position, or the loss against `targets`.

        Args:
            input_ids: [B, T] int64.
            targets: [B, T] int64, -100 where nothing is scored.

        Returns:
            logits [B, T, V], or with `targets` a dict of `loss` and `ce_loss`, which are
            the same mean in nats.
        """
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.final_norm(hidden)
        if targets is None:
            return self.head(hidden)
        loss = self.head(hidden, targets)[0]
        return {"loss": loss, "ce_loss": loss}


class _Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), with RMSNorm."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        dim, inner, heads = config.dim, config.inner_dim, config.num_heads
        # The variance of the residual stream at the start does not grow with depth.
        std = STD / math.sqrt((2 if config.ffn_dim else 1) * config.n_layers)
        self.mixer_norm = nn.RMSNorm(dim)
        self.convolution = None
        if config.convolution:
            self.convolution = ShortConvolution(dim, config.convolution)
        self.mixer: nn.Module
        if config.mixer == "attention":
            self.mixer = Attention(dim, heads, std)
        elif config.mixer == "min_gru":
            self.mixer = MinGRU(dim, inner, std)
        elif config.mixer == "mamba2":
            self.mixer = Mamba2(dim, inner, heads, config.state_dim, std)
        else:
            self.mixer = GatedDeltaNet(
                dim, inner, heads, config.state_dim, std, config.negative_eigenvalues
            )
        self.feed_forward = None
        if config.ffn_dim:
            self.feed_forward_norm = nn.RMSNorm(dim)
            self.feed_forward = SwiGLU(dim, config.ffn_dim, std)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        inputs = self.mixer_norm(hidden)
        if self.convolution is not None:
            inputs, _ = self.convolution(inputs, None)
        hidden = hidden + self.mixer(inputs)
        if self.feed_forward is not None:
            hidden = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return hidden

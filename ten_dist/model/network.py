"""The Temporal Eigenstate Network: embedding, blocks, final norm, tied head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ten_dist.config.model import IGNORED_TARGET, TemporalEigenstateConfig
from ten_dist.model.block import Block, BlockState
from ten_dist.model.document_starts import document_starts
from ten_dist.model.linear import linear
from ten_dist.model.linear_cross_entropy import linear_cross_entropy
from ten_dist.model.mixer import EigenstateMixer
from ten_dist.model.trainable_model import TrainableModel
from ten_dist.model.weight_initialization import OwnValues, fill_normal


class NetworkState(NamedTuple):
    """State of every block after some tokens; its size does not depend on how many."""

    blocks: tuple[BlockState, ...]
    after_separator: Tensor | None = None
    """[B] bool, whether the last token ended a document, where documents are masked."""


class TokenEmbedding(OwnValues, nn.Embedding):
    """Token id -> [d]."""

    STD = 0.02
    """Standard deviation of initial weights."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(vocab_size, dim)
        fill_normal(self.weight, self.STD)


class TiedHead(nn.Module):
    """Linear map from [..., d] to V logits, with the weight of the embedding.

    A module of its own, because ZeRO-3 gathers a weight for the module that uses it.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.tie(embedding)

    def tie(self, embedding: nn.Embedding) -> None:
        """Share the weight of `embedding`; needed again where parameters are replaced."""
        self.weight = embedding.weight

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, z_loss_weight: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits [..., V], or with `targets` [...] the losses of
        :func:`linear_cross_entropy`, without ever holding all logits."""
        if targets is None:
            return linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, targets, z_loss_weight)


class TemporalEigenstateNetwork(TrainableModel):
    """TEN or, where the configuration has scales, causal HTEN language model.

    With `mixer` "attention" it is the transformer to compare them with.

    Where the configuration has a `document_separator_id`, no token has any effect behind
    the next such token, in training, evaluation and streaming alike (see
    :mod:`ten_dist.model.document_starts`). A TEN then computes of a document what it would of
    that document alone; an HTEN, whose pooling keeps the phase of the row, does where the
    document starts at a multiple of its largest scale, and elsewhere pools other windows
    of the same document; a TEN with levels, whose blocks do so too, where it starts at a
    multiple of the longest block.

    There is no positional embedding: the recurrence carries position, and a model runs
    at any length. Initial weights depend on torch's global seed alone.
    """

    def __init__(self, config: TemporalEigenstateConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, layer) for layer in range(config.n_layers)
        )
        self.final_norm = nn.LayerNorm(config.dim)
        self.head = TiedHead(self.embedding)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        state: NetworkState | None = None,
        return_state: bool = False,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, NetworkState] | dict[str, Tensor]:
        """Logits of the next token at each position, or the loss against `targets`.

        Args:
            input_ids: [B, T] int64, T >= 1.
            targets: [B, T] int64; where given, the losses of :meth:`compute_loss` are
                returned instead of logits.
            state: what an earlier call returned for the tokens before these.
            return_state: also return the state after these tokens.
            last_only: logits of the last position alone, [B, 1, V].

        Returns:
            logits [B, T, V]; with `return_state` (logits, state); with `targets` a dict.
        """
        hidden, energy, state = self._run_blocks(input_ids, state, return_state)
        if last_only:
            hidden = hidden[:, -1:]
        hidden = self.final_norm(hidden)
        if targets is not None:
            config = self.config
            token_loss, z_loss, position_losses = self.head(
                hidden, targets, config.z_loss_weight
            )
            losses = {
                "loss": token_loss + config.energy_reg_weight * energy,
                "ce_loss": token_loss,
                "energy_loss": energy,
            }
            if config.z_loss_weight:
                losses |= {"ce_loss": token_loss - z_loss, "z_loss": z_loss}
            counted = (targets != IGNORED_TARGET).sum(dim=1).clamp(min=1)
            return {**losses, "row_losses": position_losses.sum(dim=1) / counted}
        logits = self.head(hidden)
        return (logits, state) if return_state else logits

    def _run_blocks(
        self, input_ids: Tensor, state: NetworkState | None, return_state: bool
    ) -> tuple[Tensor, Tensor, NetworkState]:
        """Hidden states [B, T, d], energy loss (scalar) and state of the blocks.

        Without `return_state` the state of no block is kept: that of attention is as
        large as what recomputation saves.
        """
        config = self.config
        hidden = self.dropout(self.embedding(input_ids))
        resets = after_separator = None
        if config.document_separator_id is not None:
            resets, after_separator = document_starts(
                input_ids,
                config.document_separator_id,
                None if state is None else state.after_separator,
            )
        recompute = (
            config.gradient_checkpointing == "block"
            and self.training
            and torch.is_grad_enabled()
        )
        states = state.blocks if state is not None else (None,) * config.n_layers
        new_states, energies = [], []
        for block, block_state in zip(self.blocks, states):
            if recompute:
                hidden, energy, block_state = checkpoint(
                    block, hidden, block_state, resets, use_reentrant=False
                )
            else:
                hidden, energy, block_state = block(hidden, block_state, resets)
            energies.append(energy)
            if return_state:
                new_states.append(block_state)
        if config.energy_kind == "state":
            energies = [
                energy / config.eigenstates_of(layer)
                for layer, energy in enumerate(energies)
            ]
        energy = torch.stack(energies).mean()
        return hidden, energy, NetworkState(tuple(new_states), after_separator)

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> None:
        """Make ready for use alone: what only training changes is computed once.

        Matrices are kept in `dtype`, in which autocast would multiply them; in place, and
        once only.
        """
        for module in self.modules():
            if isinstance(module, EigenstateMixer):
                module.freeze(dtype)
        # A token's embedding enters the residual stream as it is.
        for name in self.hidden_matrices():
            matrix = self.get_parameter(name)
            matrix.data = matrix.data.to(dtype)
        head = self.embedding.weight.to(dtype)
        self.head.weight = nn.Parameter(head, requires_grad=False)
        self.requires_grad_(False)

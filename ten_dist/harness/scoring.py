"""Log-likelihoods of token sequences of any length, on any number of ranks.

A sequence is read in pieces, and the state of the model carried from one to the next: no
context is ever cut, and memory does not grow with the length. Sequences of about the same
length share a batch; one that ends leaves it with the piece, which is filled up on the
right, where a causal model does not look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ten_dist.model.linear_cross_entropy import LOGITS_AT_ONCE
from ten_dist.model.state import select_rows


class TokenSequence(NamedTuple):
    """Tokens, of which the last ones are scored."""

    tokens: Sequence[int]
    first_scored: int
    """Index of the first token that is scored, from 1: each needs one before it."""


class Score(NamedTuple):
    """What a model says of the scored tokens of a sequence."""

    log_likelihood: float
    """Sum of their log-probabilities, in nats."""
    greedy: bool
    """Whether each of them is the most likely one at its place."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores sequences with a model that every rank has, or has a part of.

    Ranks share the sequences, and call the model equally often, with equal shapes: where
    its weights are sharded, each call gathers them from all ranks.
    """

    model: Callable[..., Any]
    """Called as model(ids, state=..., return_state=True, last_only=...), which returns
    logits [B, T, V] and the state; in the mode of evaluation."""
    vocab_size: int
    device: torch.device
    batch_size: int = 32
    """Sequences at once on a rank."""
    tokens_at_once: int = 2**12
    """Tokens, of all sequences of a rank together, that the model is given at once."""
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """The values that all ranks give, by rank."""

    def score(
        self,
        sequences: Sequence[TokenSequence],
        after_batch: Callable[[int], object] = lambda count: None,
    ) -> list[Score]:
        """Score sequences; every rank gives all of them and gets all scores.

        Args:
            sequences: each of one token or more.
            after_batch: called on every rank after each batch, with the number of its
                sequences.
        """
        order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n].tokens))
        at_once = self.batch_size * self.world_size
        own: list[tuple[int, Score]] = []
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            scores = self._score_batch([sequences[number] for number in batch])
            own += zip(batch[self.rank :: self.world_size], scores, strict=True)
            after_batch(len(batch))
        by_number = dict(pair for part in self.gather(own) for pair in part)
        return [by_number[number] for number in range(len(sequences))]

    @torch.no_grad()
    def _score_batch(self, batch: Sequence[TokenSequence]) -> list[Score]:
        """Scores of this rank's part of the sequences, longest first, of all ranks."""
        mine = batch[self.rank :: self.world_size]
        shape = (-(-len(batch) // self.world_size), len(batch[0].tokens))
        tokens, scored = self._tensors(mine, shape)
        totals = torch.zeros(len(tokens), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        state = None
        for start, end, rows, judged in self._pieces(batch):
            if state is not None and rows < len(tokens):
                state = select_rows(state, range(rows))
            # The last rows have ended.
            tokens, scored = tokens[:rows], scored[:rows]
            logits, state = self.model(
                tokens[:, start:end],
                state=state,
                return_state=True,
                last_only=not judged,
            )
            if judged:
                targets, counted = tokens[:, start + 1 : end + 1], scored[:, start:end]
                losses, likeliest = _judge(logits, targets)
                totals[:rows] -= losses.double().masked_fill(~counted, 0).sum(dim=1)
                greedy[:rows] &= (likeliest | ~counted).all(dim=1)
            # Before the next ones are made.
            del logits
        both = zip(totals.tolist(), greedy.tolist())
        return [Score(*score) for score, _ in zip(both, mine)]

    def _tensors(
        self, sequences: Sequence[TokenSequence], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of sequences as the first rows of int64 [rows, tokens], and which of the
        tokens behind them are scored, bool."""
        tokens = torch.zeros(shape, dtype=torch.int64)
        scored = torch.zeros(shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            tokens[row, :length] = torch.tensor(sequence.tokens)
            scored[row, sequence.first_scored - 1 : length - 1] = True
        return tokens.to(self.device), scored.to(self.device)

    def _pieces(
        self, batch: Sequence[TokenSequence]
    ) -> Iterator[tuple[int, int, int, bool]]:
        """Start and end of each piece, the rows of each rank that have not ended there,
        and whether it has targets that are scored; the same on all ranks."""
        steps = [len(sequence.tokens) - 1 for sequence in batch]
        firsts = [sequence.first_scored - 1 for sequence in batch]
        start, lasting = 0, len(batch)
        while True:
            while lasting and steps[lasting - 1] <= start:
                lasting -= 1
            if not lasting:
                return
            rows = -(-lasting // self.world_size)
            first = min(firsts[:lasting])
            size = max(1, self.tokens_at_once // rows)
            if start < first:
                end = min(start + size, first)
            else:
                # Logits and what is made of them, in float32.
                most = LOGITS_AT_ONCE // (4 * rows * self.vocab_size)
                end = min(start + max(1, min(size, most)), steps[0])
            yield start, end, rows, start >= first
            start = end


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target in nats, and whether it is the likeliest token; [B, T]
    float32 and bool, of logits [B, T, V]."""
    logits = logits.float()
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(dim=-1) - picked, logits.argmax(dim=-1) == targets

"""The next token of each row, drawn from its logits as the row's own settings say.

What a row draws depends on its logits, settings and seed alone, and not on the rows beside
it: each has a generator of its own, and one uniform number of it chooses each token.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ten_dist.config.options import Options, at_least, more_than

# Logits divided by less could overflow, and no token but the likeliest would be drawn.
_LEAST_TEMPERATURE = 1e-6
# Tokens that have most of the probability in nearly every place of a text.
_OFTEN_ENOUGH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How tokens are drawn from the probabilities that a model gives them."""

    temperature: Annotated[float, at_least(0)] = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: Annotated[int | None, at_least(1)] = None
    """Sample among the N most likely tokens; by default all."""
    top_p: Annotated[float | None, more_than(0, most=1)] = None
    """Sample among the likeliest tokens of this total; by default 1."""
    min_p: Annotated[float | None, more_than(0, most=1)] = None
    """Sample among tokens of at least this part of the likeliest one's probability."""
    repetition_penalty: Annotated[float, more_than(0)] = 1.0
    """Divides the positive logits of tokens of prompt and continuation, and multiplies the
    negative ones (Keskar et al. 2019, CTRL, section 4.1); 1 leaves them."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the continuation has it."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once if the continuation has it."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the sampling."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _LEAST_TEMPERATURE


class Sampler:
    """What the drawing of one sequence remembers from token to token.

    Args:
        sampling: how tokens are drawn.
        prompt: tokens that stand before the first one.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        repeated = sampling.repetition_penalty != 1
        # Only what a setting asks for: a prompt may be long.
        self._before = set(prompt) if repeated else set()
        self._counts: Counter[int] = Counter()
        self.penalizes = bool(
            repeated or sampling.frequency_penalty or sampling.presence_penalty
        )
        """Whether logits depend on the tokens before."""

    def uniform(self) -> float:
        """The number in [0, 1) that chooses the next token."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def remember(self, token: int) -> None:
        """Take note of the token that was drawn."""
        if self.penalizes:
            self._counts[token] += 1

    def penalized(self, logits: Tensor) -> Tensor:
        """The logits [V], less likely where a token has been."""
        sampling, logits = self.sampling, logits.clone()
        if sampling.repetition_penalty != 1 and (
            seen := self._before | set(self._counts)
        ):
            index = torch.tensor(sorted(seen), device=logits.device)
            values, penalty = logits[index], sampling.repetition_penalty
            logits[index] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            index = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device)
            logits[index] -= (
                sampling.frequency_penalty * counts + sampling.presence_penalty
            )
        return logits


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row.

    Args:
        logits: [B, V] float32.
        samplers: those of the B rows, which remember what is drawn.
    """
    # Row by row: one fits into the caches of a processor, and all do not.
    drawn = [_draw_one(row, sampler) for row, sampler in zip(logits, samplers)]
    tokens = torch.stack(drawn).tolist()
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.remember(token)
    return tokens


def _draw_one(logits: Tensor, sampler: Sampler) -> Tensor:
    """The next token, a scalar, of a row of logits [V]."""
    if sampler.penalizes:
        logits = sampler.penalized(logits)
    sampling = sampler.sampling
    if sampling.greedy:
        return logits.argmax()
    likely = likely_tokens(logits / sampling.temperature, sampling)
    # In float64, where the sum of many small probabilities is still exact enough.
    bounds = likely.softmax(dim=0).double().cumsum(dim=0)
    # The number is drawn on the CPU: a seed gives the same tokens on every device.
    chosen = torch.searchsorted(bounds, bounds[-1:] * sampler.uniform(), right=True)
    return chosen[0].clamp(max=len(logits) - 1)


def likely_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits [V] with minus infinity for tokens that top_k, top_p and min_p leave out.

    The most likely token always stays.
    """
    if sampling.top_k is not None and sampling.top_k < len(logits):
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = _likeliest_of_total(logits.softmax(dim=0), sampling.top_p)
        logits = torch.full_like(logits, -math.inf).index_copy(0, kept, logits[kept])
    if sampling.min_p is not None:
        least = logits.max() + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _likeliest_of_total(probabilities: Tensor, total: float) -> Tensor:
    """The fewest of the likeliest tokens whose probabilities [V] reach a total: ids [n]."""
    # To sort all takes ten times as long as to find the first, which are mostly enough.
    for count in (_OFTEN_ENOUGH, len(probabilities)):
        likeliest = probabilities.topk(min(count, len(probabilities)))
        sums = likeliest.values.cumsum(dim=0)
        if sums[-1] >= total:
            break
    return likeliest.indices[sums - likeliest.values < total]

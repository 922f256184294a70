"""Synthetic tasks in which a model repeats what it was shown: recall and copying.

Rows hold one of several numbers of things, by which accuracy is told.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.tasks.interface import HELD_OUT_SEED, Batch, accuracy, mean_loss
from ten_dist.config.model import IGNORED_TARGET


class _Drawn(abc.ABC):
    vocab_size: int
    things: str
    """What a row holds."""
    counts: tuple[int, ...]
    """How many."""

    @abc.abstractmethod
    def draw(self, rows: int, count: int, generator: torch.Generator) -> Batch:
        """A batch of rows with `count` things each."""

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`accuracy N THINGS` for each number of them, over 256 rows."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return {
            f"accuracy {n} {self.things}": accuracy(
                model, *self.draw(256, n, generator)
            )
            for n in self.counts
        }

    def quick_loss(self, model: nn.Module) -> float:
        """Loss of 16 rows with each number of things."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return mean_loss(model, (self.draw(16, n, generator) for n in self.counts))


class AssociativeRecall(_Drawn):
    """Multi-query associative recall (MQAR: Arora et al., Zoology, arXiv 2312.04927,
    definition 3.1).

    Pairs of a key and a value; behind them the keys again, each once, at random distances,
    with filler between them. At each of these the model must give the key's value; chance is
    1/64, and 1 in the number of pairs for whoever knows which values occur. Keys and
    values are disjoint, keys of a row distinct.

    A row of N pairs has 16 N tokens. Of the pairs of places behind the N shown pairs, the j-th
    of m is asked at with a probability in proportion to j^(0.01 - 1), drawn without
    replacement: the power law of the authors' code, which asks soon more often than late. Which
    key is asked where is uniform. Filler is one token of its own, where the paper's larger
    vocabulary leaves room for random ones.
    """

    KEYS, VALUES, TOKENS_A_PAIR, POWER = 64, 64, 16, 0.01
    vocab_size = KEYS + VALUES + 1
    things = "pairs"
    counts = (4, 8, 16)

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """Batches with one number of pairs, of as many tokens as `rows` rows of the most.

        A quarter of the steps has the fewest pairs alone, from then on their number is drawn
        evenly: so a transformer finds looking up within 300 steps, where otherwise it
        does not in 1000.
        """
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            choice = int(torch.randint(len(self.counts), (), generator=generator))
            count = self.counts[choice if step >= steps // 4 else 0]
            yield self.draw(rows * self.counts[-1] // count, count, generator)

    def draw(self, rows: int, count: int, generator: torch.Generator) -> Batch:
        """A batch of [rows, 16 x count]."""
        keys = shuffled(rows, self.KEYS, generator)[:, :count]
        values = torch.randint(self.VALUES, (rows, count), generator=generator)
        values = values + self.KEYS
        length, shown = self.TOKENS_A_PAIR * count, 2 * count
        inputs = torch.full((rows, length), self.KEYS + self.VALUES)
        inputs[:, :shown] = torch.stack([keys, values], dim=2).flatten(1)
        weights = torch.arange(1.0, (length - shown) // 2 + 1) ** (self.POWER - 1)
        places = weights.expand(rows, -1).multinomial(count, generator=generator)
        # Drawn without replacement, the likely places come first: keys must not be in order.
        order = shuffled(rows, count, generator)
        places = shown + 2 * places.gather(1, order)
        targets = torch.full_like(inputs, IGNORED_TARGET)
        return inputs.scatter(1, places, keys), targets.scatter(1, places, values)


class SelectiveCopying(_Drawn):
    """A few symbols scattered among noise, to be repeated in order at the end.

    As in the selective state-space models (Gu and Dao 2023, section 3.1): where the
    symbols stand changes from row to row, so a fixed filter cannot solve it. Chance is
    1/16.
    """

    SYMBOLS, LENGTH = 16, 64
    vocab_size = SYMBOLS + 2
    things = "symbols"
    counts = (2, 4, 8, 16)

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """Batches with one number of symbols, drawn evenly."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            choice = int(torch.randint(len(self.counts), (), generator=generator))
            yield self.draw(rows, self.counts[choice], generator)

    def draw(self, rows: int, count: int, generator: torch.Generator) -> Batch:
        """A batch of [rows, LENGTH + count]: noise with symbols, then `count` asks."""
        noise, ask = self.SYMBOLS, self.SYMBOLS + 1
        symbols = torch.randint(self.SYMBOLS, (rows, count), generator=generator)
        places = shuffled(rows, self.LENGTH, generator)[:, :count].sort(dim=1).values
        inputs = torch.full((rows, self.LENGTH), noise).scatter(1, places, symbols)
        inputs = torch.cat([inputs, torch.full((rows, count), ask)], dim=1)
        targets = torch.full_like(inputs, IGNORED_TARGET)
        targets[:, self.LENGTH :] = symbols
        return inputs, targets


def shuffled(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count], each row a random order of 0 to count - 1."""
    return torch.rand(rows, count, generator=generator).argsort(dim=1)

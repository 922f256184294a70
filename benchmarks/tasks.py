"""What the quality experiments train on: text, token shards and two synthetic tasks.

A task gives batches of (inputs, targets), both [B, T] int64 with targets of
IGNORED_TARGET where nothing is scored, and figures of a trained model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data import BatchShape, Manifest, evaluation_batches, training_batches

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """Something a model can be trained on and measured by."""

    vocab_size: int

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` training batches of `rows` rows; the same for the same seed."""
        ...

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures of a trained model, by name."""
        ...


class Characters:
    """The characters of a text file; the last tenth is held out.

    Args:
        path: a UTF-8 text file.
        context: characters of a row.
    """

    def __init__(self, path: Path, context: int) -> None:
        text = path.read_text(encoding="utf-8")
        characters = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([characters[c] for c in text])
        self.vocab_size, self.context = len(characters), context
        boundary = int(0.9 * len(ids))
        self._train, self._held_out = ids[:boundary], ids[boundary:]

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """Rows from anywhere in the training part."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self._train) - self.context
        for _ in range(steps):
            starts = torch.randint(last, (rows,), generator=generator)
            tokens = self._train[starts[:, None] + torch.arange(self.context + 1)]
            yield tokens[:, :-1], tokens[:, 1:]

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`loss`, in nats a character, over the whole of the held-out part."""
        count = (len(self._held_out) - 1) // self.context
        whole = self._held_out[: count * self.context + 1]
        inputs, targets = (
            part.view(count, self.context) for part in (whole[:-1], whole[1:])
        )
        rows = max(1, 8192 // self.context)
        return {"loss": mean_loss(model, zip(inputs.split(rows), targets.split(rows)))}


class TokenShards:
    """Prepared token data with held-out shards in its `val` folder.

    Args:
        folder: what data_prep.shard wrote.
        context: tokens of a row.
        lengths: lengths at which the loss by position is measured; none for none.
    """

    HELD_OUT_TOKENS = 2**17

    def __init__(
        self, folder: Path, context: int, lengths: tuple[int, ...] = ()
    ) -> None:
        self._train, self._held_out = (
            Manifest.load(folder),
            Manifest.load(folder / "val"),
        )
        self.vocab_size, self.context = self._train.vocab_size, context
        self.lengths = lengths

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """The rows that `ten-dist train` reads with this seed."""
        for batch in training_batches(
            self._train,
            BatchShape(self.context, rows),
            seed=seed,
            last_step=steps,
            num_workers=0,
        ):
            yield batch.inputs, batch.targets

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`loss`, nats a token at the training length, and at each longer length the
        loss of the last training length of positions, `loss at N`.

        Each is over the same 2^17 tokens or as many as there are.
        """
        found = {"loss": mean_loss(model, self._rows(self.context))}
        for length in self.lengths:
            late = (
                (inputs, mask_before(targets, length - self.context))
                for inputs, targets in self._rows(length)
            )
            found[f"loss at {length}"] = mean_loss(model, late)
        return found

    def _rows(self, length: int) -> Iterator[Batch]:
        rows = min(self._held_out.rows(length), self.HELD_OUT_TOKENS // length)
        for batch in evaluation_batches(
            self._held_out,
            BatchShape(length, max(1, 8192 // length)),
            max_rows=rows,
        ):
            yield batch.inputs, batch.targets


class _Drawn(abc.ABC):
    """A synthetic task: the model has to repeat a number of things that it was shown.

    Rows of training hold a power of two of things, up to `most`; accuracy is told by their
    number.
    """

    vocab_size: int
    things: str
    """What they are called."""

    def __init__(self, most: int = 16) -> None:
        self.counts = [2**n for n in range(1, most.bit_length())]

    @abc.abstractmethod
    def draw(self, rows: int, count: int, generator: torch.Generator) -> Batch:
        """A batch of rows with `count` things each."""

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """Batches of rows with one number of things, drawn evenly."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            choice = int(torch.randint(len(self.counts), (), generator=generator))
            yield self.draw(rows, self.counts[choice], generator)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`accuracy N THINGS` for each number of them."""
        generator = torch.Generator().manual_seed(2**31)
        return {
            f"accuracy {n} {self.things}": accuracy(
                model, *self.draw(256, n, generator)
            )
            for n in self.counts
        }


class AssociativeRecall(_Drawn):
    """Pairs of a key and a value, then the keys again in another order (MQAR).

    After each key of the second part the model must give its value; chance is 1/64.
    """

    KEYS, VALUES = 64, 64
    vocab_size = KEYS + VALUES
    things = "pairs"

    def draw(self, rows: int, count: int, generator: torch.Generator) -> Batch:
        """A batch of [rows, 4 x count]."""
        keys = shuffled(rows, self.KEYS, generator)[:, :count]
        values = torch.randint(self.VALUES, (rows, count), generator=generator)
        values = values + self.KEYS
        order = shuffled(rows, count, generator)
        asked, answers = keys.gather(1, order), values.gather(1, order)
        inputs = torch.stack(
            [torch.cat([keys, asked], 1), torch.cat([values, answers], 1)], dim=2
        ).flatten(1)
        targets = torch.full_like(inputs, IGNORED_TARGET)
        targets[:, 2 * count :: 2] = answers
        return inputs, targets


class SelectiveCopying(_Drawn):
    """A few symbols scattered among noise, to be repeated in order at the end.

    As in the selective state-space models (Gu and Dao 2023, section 3.1): where the
    symbols stand changes from row to row, so a fixed filter cannot solve it. Chance is
    1/16.
    """

    SYMBOLS, LENGTH = 16, 64
    vocab_size = SYMBOLS + 2
    things = "symbols"

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


def mask_before(targets: Tensor, position: int) -> Tensor:
    """`targets` [B, T] without those before `position`."""
    masked = targets.clone()
    masked[:, :position] = IGNORED_TARGET
    return masked


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterator[Batch]) -> float:
    """Cross-entropy in nats, mean over all scored targets."""
    total, count = 0.0, 0
    for inputs, targets in batches:
        scored = int((targets != IGNORED_TARGET).sum())
        if scored:
            total += scored * model.compute_loss(inputs, targets)["ce_loss"].item()
            count += scored
    return total / count if count else math.nan


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Part of the scored targets that the model finds most likely."""
    scored = targets != IGNORED_TARGET
    right = model(inputs).argmax(-1) == targets
    return right[scored].double().mean().item()

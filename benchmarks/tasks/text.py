"""Tasks of text: the characters of a file, and prepared token shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.tasks.interface import (
    EVALUATION_TOKENS,
    Batch,
    mask_before,
    mean_loss,
)
from ten_dist.data import BatchShape, Manifest, evaluation_batches, training_batches


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
        return {"loss": mean_loss(model, self._rows(len(self._held_out)))}

    def quick_loss(self, model: nn.Module) -> float:
        """Loss of the first 16,384 characters of the held-out part."""
        return mean_loss(model, self._rows(2**14))

    def _rows(self, characters: int) -> Iterator[Batch]:
        count = (min(characters, len(self._held_out)) - 1) // self.context
        whole = self._held_out[: count * self.context + 1]
        inputs, targets = (
            part.view(count, self.context) for part in (whole[:-1], whole[1:])
        )
        rows = max(1, EVALUATION_TOKENS // self.context)
        return zip(inputs.split(rows), targets.split(rows))


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
        found = {
            "loss": mean_loss(model, self._rows(self.context, self.HELD_OUT_TOKENS))
        }
        for length in self.lengths:
            late = (
                (inputs, mask_before(targets, length - self.context))
                for inputs, targets in self._rows(length, self.HELD_OUT_TOKENS)
            )
            found[f"loss at {length}"] = mean_loss(model, late)
        return found

    def quick_loss(self, model: nn.Module) -> float:
        """Loss of 2^14 held-out tokens."""
        return mean_loss(model, self._rows(self.context, 2**14))

    def _rows(self, length: int, tokens: int) -> Iterator[Batch]:
        for batch in evaluation_batches(
            self._held_out,
            BatchShape(length, max(1, EVALUATION_TOKENS // length)),
            max_rows=min(self._held_out.rows(length), tokens // length),
        ):
            yield batch.inputs, batch.targets

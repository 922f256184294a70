"""Held-out rows that a model is looked at with, and how many of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ten_dist.data import BatchShape, Manifest, evaluation_batches

_TOKENS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class HeldOutRows:
    """R rows of T tokens."""

    inputs: Tensor
    """[R, T] int64."""
    targets: Tensor
    """[R, T] int64, the token after each input; -100 where it does not count."""

    @classmethod
    def read(
        cls, manifest: Manifest, seq_len: int, rows: int, device: torch.device
    ) -> HeldOutRows:
        """The first `rows` rows of a token set, or as many as it has.

        Raises:
            DataError: the set has not one row of that length, or a shard is damaged.
        """
        shape = BatchShape(seq_len, 1)
        found = list(evaluation_batches(manifest, shape, max_rows=rows))
        return cls(
            torch.cat([batch.inputs for batch in found]).to(device),
            torch.cat([batch.targets for batch in found]).to(device),
        )

    def batches(self) -> Iterator[HeldOutRows]:
        """These rows in pieces that bound the memory, of some thousands of tokens."""
        size = max(1, _TOKENS_AT_ONCE // self.inputs.shape[1])
        pieces = zip(self.inputs.split(size), self.targets.split(size))
        for inputs, targets in pieces:
            yield HeldOutRows(inputs, targets)

"""Which row is read when, and by whom: pure functions, no state to save.

Row r of length T is tokens [rT, rT + T + 1) of the stream. A *position* counts rows
from the start of training, through the epochs: it is all that a run must remember of
the data. Rows are shuffled within groups of shards, so that a reader needs only a few
shards in memory however large the set is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ten_dist.data.manifest import Manifest
from ten_dist.errors import ConfigurationError

SHARDS_PER_GROUP = 8
"""Shards whose rows are shuffled together. Changing it changes every run's order."""


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of the SplitMix64 generator, a bijection of uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed_permutation(count: int, *key: str | int) -> np.ndarray:
    """A permutation of 0..count-1, int64, that depends on ``count`` and ``key`` alone.

    It is the order of a hash of each index, so it is the same with every version of
    numpy, which a seeded ``numpy.random.Generator`` does not promise.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    first, second = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    steps = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(_mix(_mix(steps + first) ^ second), kind="stable")


class RowOrder:
    """The order in which the rows of a token set are read, epoch after epoch.

    It is a pure function of (manifest fingerprint, seed, epoch, seq_len): each epoch
    reads each row once, shards permuted, taken in groups of ``SHARDS_PER_GROUP``, the
    rows that start in a group permuted together.

    Raises:
        ConfigurationError: ``seq_len`` is not positive.
        DataError: the set has not one row of that length.
    """

    def __init__(self, manifest: Manifest, seq_len: int, seed: int) -> None:
        self.rows_per_epoch = manifest.rows(seq_len)
        """Rows of one epoch."""
        self._key = (manifest.fingerprint, int(seed), int(seq_len))
        counts = [shard.tokens for shard in manifest.shards]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # The first row that starts at or after the start of each shard.
        firsts = -(-offsets // seq_len)
        self._firsts = np.minimum(firsts, self.rows_per_epoch)
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None
        self._group: tuple[int, int, np.ndarray] | None = None

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows at positions ``start`` to ``stop`` of the endless sequence.

        Position p is index p % rows_per_epoch of epoch p // rows_per_epoch, so no row
        is dropped: the tail of an epoch is joined by the first rows of the next.

        Returns:
            (epochs, rows), both int64 [stop - start].

        Raises:
            ValueError: the range is negative.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start}:{stop} are not a range")
        epochs, rows = [], []
        position = start
        while position < stop:
            epoch, index = divmod(position, self.rows_per_epoch)
            first, order = self._group_at(epoch, index)
            taken = order[index - first : index - first + stop - position]
            rows.append(taken)
            epochs.append(np.full(taken.size, epoch, dtype=np.int64))
            position += taken.size
        if not rows:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return np.concatenate(epochs), np.concatenate(rows)

    @property
    def group(self) -> tuple[int, int] | None:
        """(epoch, number) of the group that :meth:`rows` gave the last row from."""
        return None if self._group is None else self._group[:2]

    def shards_ahead(self) -> np.ndarray:
        """The shards of that group, then those of the one that follows it: int64, 1-D."""
        if self._group is None:
            raise ValueError("no row was asked for yet")
        epoch, group = self._group[:2]
        groups, _ = self._layout(epoch)
        last = group + 1 == len(groups)
        following = self._layout(epoch + 1)[0][0] if last else groups[group + 1]
        return np.concatenate([groups[group], following])

    def _layout(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shards of each group of an epoch, and the first index of each group."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = keyed_permutation(self._firsts.size - 1, *self._key, epoch)
            groups = [
                shards[at : at + SHARDS_PER_GROUP]
                for at in range(0, shards.size, SHARDS_PER_GROUP)
            ]
            rows = np.diff(self._firsts)
            sizes = [int(rows[group].sum()) for group in groups]
            bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            self._epoch = (epoch, groups, bounds)
        return self._epoch[1], self._epoch[2]

    def _group_at(self, epoch: int, index: int) -> tuple[int, np.ndarray]:
        """The first index, and the rows in order, of the group that holds an index."""
        groups, bounds = self._layout(epoch)
        group = int(np.searchsorted(bounds, index, side="right")) - 1
        if self._group is None or self._group[:2] != (epoch, group):
            rows = np.concatenate(
                [
                    np.arange(self._firsts[shard], self._firsts[shard + 1])
                    for shard in groups[group]
                ]
            )
            order = keyed_permutation(rows.size, *self._key, epoch, group)
            self._group = (epoch, group, rows[order])
        return int(bounds[group]), self._group[2]


def accumulation_steps(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> int:
    """Micro-batches that each rank contributes to a global batch.

    Raises:
        ConfigurationError: a size is not positive, or the global batch is not a
            multiple of micro-batch x world size.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise ConfigurationError(
            f"--global_batch_size {global_batch_size}, --micro_batch_size "
            f"{micro_batch_size} and the {world_size} ranks must each be at least 1"
        )
    steps, rest = divmod(global_batch_size, micro_batch_size * world_size)
    if rest:
        raise ConfigurationError(
            f"--global_batch_size {global_batch_size} is not a multiple of "
            f"--micro_batch_size {micro_batch_size} x {world_size} ranks = "
            f"{micro_batch_size * world_size}"
        )
    return steps


@dataclass(frozen=True)
class BatchShape:
    """The rows of a step, and which of them one rank reads.

    A step has ``accumulation_steps`` x ``world_size`` x ``micro_batch_size`` rows of
    ``seq_len`` inputs, at consecutive positions: the shape only cuts them up.

    Raises:
        ConfigurationError: a size is not positive, or there is no such rank.
    """

    seq_len: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"--{name} must be at least 1, not {getattr(self, name)}"
                )
        if not 0 <= self.rank < self.world_size:
            raise ConfigurationError(
                f"rank {self.rank} is not one of {self.world_size} ranks"
            )

    def positions(self, number: int) -> tuple[int, int]:
        """Positions (start, stop) of micro-batch ``number`` of this rank, counted from
        the first step on."""
        start = (number * self.world_size + self.rank) * self.micro_batch_size
        return start, start + self.micro_batch_size


def batch_of_step(step: int, excluded: Iterable[int]) -> int:
    """Which global batch a step reads, both 0-based, where some are left out."""
    for left_out in sorted(excluded):
        step += left_out <= step
    return step

"""Batches of tokens for training and evaluation, in the order of ``order.py``."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data.manifest import Manifest
from ten_dist.data.mixture import MixedOrder, Mixture
from ten_dist.data.order import (
    SHARDS_PER_GROUP,
    accumulation_steps,
    batch_of_step,
    micro_batch_positions,
)
from ten_dist.data.shards import TokenReader
from ten_dist.data.workers import read_ahead
from ten_dist.errors import ConfigurationError


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of m rows of T inputs.

    ``sources``, ``epochs`` and ``rows`` (int64 [m], numpy) say which rows these are, and
    of which set of a mixture (0 where there is one); a padding row has row -1. ``tokens``
    is int64 [m, T + 1]; ``targets`` is int64 [m, T]: the token
    after each input, or -100 throughout in a padding row.
    """

    step: int
    micro_step: int
    sources: np.ndarray
    epochs: np.ndarray
    rows: np.ndarray
    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [m, T], a view of ``tokens``."""
        return self.tokens[:, :-1]


@dataclass(frozen=True)
class _RawBatch:
    """What crosses from a worker: numpy arrays, the tokens as small as stored."""

    step: int
    micro_step: int
    sources: np.ndarray
    epochs: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray


def _token_batch(raw: _RawBatch) -> TokenBatch:
    tokens = torch.from_numpy(raw.tokens.astype(np.int64))
    targets = tokens[:, 1:]
    padding = torch.from_numpy(raw.rows < 0)
    if padding.any():
        targets = targets.masked_fill(padding[:, None], IGNORED_TARGET)
    return TokenBatch(
        raw.step, raw.micro_step, raw.sources, raw.epochs, raw.rows, tokens, targets
    )


def _read_rows(reader: TokenReader, rows: np.ndarray, seq_len: int) -> np.ndarray:
    """Tokens of the given rows, [m, seq_len + 1]; zeros for row -1."""
    tokens = np.zeros((rows.size, seq_len + 1), dtype=reader.manifest.numpy_dtype)
    for at, row in enumerate(rows.tolist()):
        if row >= 0:
            tokens[at] = reader.read(row * seq_len, row * seq_len + seq_len + 1)
    return tokens


def _micro_batches(
    mixture: Mixture,
    seq_len: int,
    seed: int,
    slices: dict[str, int],
    numbers: tuple[int, int | None],
    excluded: tuple[int, ...],
    first: int,
    stride: int,
) -> Iterator[_RawBatch]:
    """Every ``stride``-th micro-batch of one rank, from the ``first`` on.

    ``slices`` are the sizes for :func:`micro_batch_positions`; ``numbers`` are the range
    of the rank's micro-batches, counted from the start of training, perhaps open-ended.
    ``excluded`` are global batches that no step reads.
    """
    order = MixedOrder(mixture, seq_len, seed)
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(contextlib.closing(_training_reader(manifest)))
            for manifest in mixture.manifests
        ]
        accumulation = accumulation_steps(
            slices["global_batch_size"],
            slices["micro_batch_size"],
            slices["world_size"],
        )
        groups: list[tuple[int, int] | None] = [None] * len(readers)
        begin, end = numbers
        for number in itertools.count(begin + first, stride):
            if end is not None and number >= end:
                return
            step, micro_step = divmod(number, accumulation)
            batch = batch_of_step(step, excluded)
            positions = micro_batch_positions(batch, micro_step, **slices)
            sources, epochs, rows = order.rows(*positions)
            tokens = np.empty(
                (rows.size, seq_len + 1), mixture.tokenizer_set.numpy_dtype
            )
            for source in np.unique(sources):
                source_order = order.orders[source]
                if source_order.group != groups[source]:
                    groups[source] = source_order.group
                    readers[source].expect(source_order.shards_ahead())
                here = sources == source
                tokens[here] = _read_rows(readers[source], rows[here], seq_len)
            yield _RawBatch(step, micro_step, sources, epochs, rows, tokens)


def _training_reader(manifest: Manifest) -> TokenReader:
    largest = max(shard.tokens for shard in manifest.shards)
    # A whole group of shards must fit: its rows come in random order.
    return TokenReader(manifest, (SHARDS_PER_GROUP + 1) * largest)


def training_batches(
    data: Manifest | Mixture,
    *,
    seq_len: int,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    first_step: int = 0,
    last_step: int | None = None,
    num_workers: int = 1,
    excluded: Iterable[int] = (),
) -> Iterator[TokenBatch]:
    """The micro-batches of one rank, from ``first_step`` on, in order.

    Step s reads positions [s B, s B + B) of :class:`RowOrder`, or of the order of a
    mixture, B the global batch size, so the rows of a step depend neither on the number
    of ranks nor on the micro-batch size nor on the workers; and a run that resumes at
    step s reads what it would have read. Each step yields global / (micro x world) batches of ``micro_batch_size`` rows.

    Args:
        data: a token set, or several in proportion.
        first_step: first step, 0-based.
        last_step: stop *before* this step; None is endless.
        num_workers: processes that read ahead; 0 reads in this one.
        excluded: global batches, 0-based, that no step reads: step s reads the one with
            s others before it that are not among them.

    Raises:
        ConfigurationError: at the call: sizes that do not divide, or out of range.
        DataError: at the call: too few tokens for one row; while iterating: a shard is
            missing or damaged.
    """
    accumulation = accumulation_steps(global_batch_size, micro_batch_size, world_size)
    _check_rank(rank, world_size)
    if first_step < 0 or num_workers < 0:
        raise ConfigurationError("first_step and num_workers must not be negative")
    data.rows(seq_len)
    mixture = data if isinstance(data, Mixture) else Mixture(("",), (data,), (1.0,))
    slices = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "rank": rank,
        "world_size": world_size,
    }
    end = None if last_step is None else last_step * accumulation
    numbers = (first_step * accumulation, end)
    produce = functools.partial(
        _micro_batches, mixture, seq_len, seed, slices, numbers, tuple(excluded)
    )
    items = read_ahead(produce, num_workers) if num_workers else produce(0, 1)
    return _token_batches(items)


def _token_batches(items: Iterator[_RawBatch]) -> Iterator[TokenBatch]:
    # Closed with this generator, rather than when it happens to be collected.
    with contextlib.closing(items):
        for item in items:
            yield _token_batch(item)


def evaluation_batches(
    manifest: Manifest,
    *,
    seq_len: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    max_rows: int | None = None,
) -> Iterator[TokenBatch]:
    """Rows in stream order, each read by exactly one rank, once.

    Every rank yields the same number of batches of the same shape, of ``micro_batch_size``
    rows or as many as there are for it, as sharded
    parameters require; the rows missing at the end are padding: row -1, targets -100,
    possibly a whole batch of them. ``step`` counts the batches of the rank.

    Args:
        max_rows: stop after this many rows over all ranks; None reads all.

    Raises:
        ConfigurationError: at the call: a size or the rank is out of range.
        DataError: at the call: too few tokens for one row; while iterating: a shard is
            missing or damaged.
    """
    if micro_batch_size < 1:
        raise ConfigurationError(
            f"--micro_batch_size must be at least 1, not {micro_batch_size}"
        )
    if max_rows is not None and max_rows < 1:
        raise ConfigurationError(f"max_rows must be at least 1, not {max_rows}")
    _check_rank(rank, world_size)
    total = manifest.rows(seq_len)
    if max_rows is not None:
        total = min(total, max_rows)
    # Padding is computed like rows: no more than makes the ranks alike.
    micro_batch_size = min(micro_batch_size, -(-total // world_size))
    return _evaluate(manifest, seq_len, micro_batch_size, rank, world_size, total)


def _evaluate(
    manifest: Manifest,
    seq_len: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    total: int,
) -> Iterator[TokenBatch]:
    reader = TokenReader(manifest)
    for step in range(-(-total // (world_size * micro_batch_size))):
        start = (step * world_size + rank) * micro_batch_size
        rows = np.arange(start, start + micro_batch_size, dtype=np.int64)
        rows[rows >= total] = -1
        tokens = _read_rows(reader, rows, seq_len)
        zeros = np.zeros(micro_batch_size, dtype=np.int64)
        yield _token_batch(_RawBatch(step, 0, zeros, zeros, rows, tokens))


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank {rank} is not one of {world_size} ranks")

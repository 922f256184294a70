"""Batches of tokens for training and evaluation, in the order of ``order.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data.manifest import Manifest
from ten_dist.data.mixture import MixedOrder, Mixture
from ten_dist.data.order import SHARDS_PER_GROUP, BatchShape, batch_of_step
from ten_dist.data.shards import COUNTED, TokenReader, token_ids
from ten_dist.data.workers import read_ahead
from ten_dist.errors import ConfigurationError


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of m rows of T inputs.

    ``sources``, ``epochs`` and ``rows`` (int64 [m], numpy) say which rows these are, and
    of which set of a mixture (0 where there is one); a padding row has row -1.
    """

    step: int
    micro_step: int
    sources: np.ndarray
    epochs: np.ndarray
    rows: np.ndarray
    stored: np.ndarray
    """[m, T + 1] in the dtype of the shards, which is what crosses from a worker."""
    masked: bool = False
    """Whether tokens are marked, and targets only those that count."""

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        """int64 [m, T + 1]."""
        ids = token_ids(self.stored, self.masked)
        return torch.from_numpy(ids.astype(np.int64))

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [m, T], a view of ``tokens``."""
        return self.tokens[:, :-1]

    @property
    def counted_tokens(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED_TARGET).sum())

    @functools.cached_property
    def targets(self) -> torch.Tensor:
        """int64 [m, T]: the token after each input, or -100 where it does not count: by
        the loss mask, and throughout a padding row."""
        padding = torch.from_numpy(self.rows < 0)
        targets = self.tokens[:, 1:]
        if self.masked:
            counts = torch.from_numpy((self.stored[:, 1:] & COUNTED) != 0)
            targets = targets.masked_fill(~counts, IGNORED_TARGET)
        if padding.any():
            return targets.masked_fill(padding[:, None], IGNORED_TARGET)
        return targets


def training_batches(
    data: Manifest | Mixture,
    shape: BatchShape,
    *,
    seed: int,
    first_step: int = 0,
    last_step: int | None = None,
    num_workers: int = 1,
    excluded: Iterable[int] = (),
) -> Iterator[TokenBatch]:
    """The micro-batches of one rank, from ``first_step`` on, in order.

    Step s reads positions [s B, s B + B) of :class:`RowOrder`, or of the order of a
    mixture, B the rows of a step. So the rows of a step depend neither on the number of
    ranks nor on the micro-batch size nor on the workers; and a run that resumes at step s
    reads what it would have read.

    Args:
        data: a token set, or several in proportion.
        shape: rows of a step, and the rank.
        seed: of the order of rows.
        first_step: first step, 0-based.
        last_step: stop *before* this step; None is endless.
        num_workers: processes that read ahead; 0 reads in this one.
        excluded: global batches, 0-based, that no step reads: step s reads the one with
            s others before it that are not among them.

    Raises:
        ConfigurationError: at the call: a number is out of range.
        DataError: at the call: too few tokens for one row; while iterating: a shard is
            missing or damaged.
    """
    if first_step < 0 or num_workers < 0:
        raise ConfigurationError("first_step and num_workers must not be negative")
    data.rows(shape.seq_len)
    mixture = data if isinstance(data, Mixture) else Mixture(("",), (data,), (1.0,))
    produce = functools.partial(
        _micro_batches, mixture, shape, seed, (first_step, last_step), tuple(excluded)
    )
    return read_ahead(produce, num_workers) if num_workers else produce(0, 1)


def _micro_batches(
    mixture: Mixture,
    shape: BatchShape,
    seed: int,
    steps: tuple[int, int | None],
    excluded: tuple[int, ...],
    first: int,
    stride: int,
) -> Iterator[TokenBatch]:
    """Every ``stride``-th micro-batch of one rank, from the ``first`` on."""
    order = MixedOrder(mixture, shape.seq_len, seed)
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(contextlib.closing(_training_reader(manifest)))
            for manifest in mixture.manifests
        ]
        groups: list[tuple[int, int] | None] = [None] * len(readers)
        per_step, (begin, end) = shape.accumulation_steps, steps
        for number in itertools.count(begin * per_step + first, stride):
            step, micro_step = divmod(number, per_step)
            if end is not None and step >= end:
                return
            batch = batch_of_step(step, excluded)
            positions = shape.positions(batch * per_step + micro_step)
            sources, epochs, rows = order.rows(*positions)
            dtype = mixture.tokenizer_set.numpy_dtype
            if mixture.masked:
                dtype = np.dtype(np.uint32)
            tokens = np.empty((rows.size, shape.seq_len + 1), dtype)
            for source in np.unique(sources):
                source_order = order.orders[source]
                if source_order.group != groups[source]:
                    groups[source] = source_order.group
                    readers[source].expect(source_order.shards_ahead())
                here = sources == source
                found = _read_rows(readers[source], rows[here], shape.seq_len)
                if mixture.masked and not readers[source].manifest.masked:
                    # All of it counts.
                    found = found | COUNTED
                tokens[here] = found
            yield TokenBatch(
                step, micro_step, sources, epochs, rows, tokens, mixture.masked
            )


def _training_reader(manifest: Manifest) -> TokenReader:
    largest = max(shard.tokens for shard in manifest.shards)
    # A whole group of shards must fit: its rows come in random order.
    return TokenReader(manifest, (SHARDS_PER_GROUP + 1) * largest)


def _read_rows(reader: TokenReader, rows: np.ndarray, seq_len: int) -> np.ndarray:
    """Tokens of the given rows as stored, [m, seq_len + 1]; zeros for row -1."""
    nothing = reader.read_stored(0, 0)
    tokens = np.zeros((rows.size, seq_len + 1), dtype=nothing.dtype)
    for at, row in enumerate(rows.tolist()):
        if row >= 0:
            first = row * seq_len
            tokens[at] = reader.read_stored(first, first + seq_len + 1)
    return tokens


def evaluation_batches(
    manifest: Manifest, shape: BatchShape, max_rows: int | None = None
) -> Iterator[TokenBatch]:
    """Rows in stream order, each read by exactly one rank, once.

    Every rank yields the same number of batches of the same shape, as sharded parameters
    require: of ``micro_batch_size`` rows, or as many as there are for it. The rows
    missing at the end are padding: row -1, targets -100, possibly a whole batch of them.
    ``step`` counts the batches of the rank.

    Args:
        manifest: the set.
        shape: rows of a batch, and the rank; nothing is accumulated.
        max_rows: stop after this many rows over all ranks; None reads all.

    Raises:
        ConfigurationError: at the call: ``max_rows`` is out of range.
        DataError: at the call: too few tokens for one row; while iterating: a shard is
            missing or damaged.
    """
    total = manifest.rows(shape.seq_len)
    if max_rows is not None:
        if max_rows < 1:
            raise ConfigurationError(f"max_rows must be at least 1, not {max_rows}")
        total = min(total, max_rows)
    # Padding is computed like rows: no more than makes the ranks alike.
    size = min(shape.micro_batch_size, -(-total // shape.world_size))
    return _evaluate(manifest, dataclasses.replace(shape, micro_batch_size=size), total)


def _evaluate(
    manifest: Manifest, shape: BatchShape, total: int
) -> Iterator[TokenBatch]:
    reader = TokenReader(manifest)
    zeros = np.zeros(shape.micro_batch_size, dtype=np.int64)
    for step in range(-(-total // (shape.world_size * shape.micro_batch_size))):
        rows = np.arange(*shape.positions(step), dtype=np.int64)
        rows[rows >= total] = -1
        tokens = _read_rows(reader, rows, shape.seq_len)
        yield TokenBatch(step, 0, zeros, zeros, rows, tokens, manifest.masked)

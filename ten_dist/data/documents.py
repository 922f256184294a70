"""The documents of a token set: where they begin and end, and how long they are.

A document is the tokens up to and including a separator; the last may lack one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ten_dist.data.manifest import Manifest
from ten_dist.data.shards import read_shard, shard_blocks


@dataclass(frozen=True)
class DocumentLengths:
    """Lengths, in tokens with the separator, of the documents of a set."""

    documents: int
    shortest: int
    longest: int
    mean: float
    histogram: tuple[int, ...]
    """Entry i counts the documents of 2^(i-1) < length <= 2^i tokens."""

    def quantile(self, share: float) -> int:
        """A length that at least this share of the documents does not exceed, a power
        of two or the longest."""
        reached = np.searchsorted(
            np.cumsum(self.histogram), share * self.documents, side="left"
        )
        return min(2 ** int(reached), self.longest)


def document_lengths(
    manifest: Manifest, tick: Callable[[int], None] = lambda tokens: None
) -> DocumentLengths:
    """Measure all documents, reading every shard once.

    Args:
        manifest: the set.
        tick: told of the tokens of each block that has been read.

    Raises:
        DataError: a shard is missing or damaged.
    """
    histogram = np.zeros(64, dtype=np.int64)
    shortest, longest, open_tokens = None, 0, 0
    for lengths, open_tokens in _lengths_by_block(manifest, tick):
        if lengths.size:
            # The exponent of the power of two that is not below a length.
            histogram += np.bincount(np.frexp(lengths - 1)[1], minlength=64)
            smallest = int(lengths.min())
            shortest = smallest if shortest is None else min(shortest, smallest)
            longest = max(longest, int(lengths.max()))
    if open_tokens:
        histogram[(open_tokens - 1).bit_length()] += 1
        shortest = open_tokens if shortest is None else min(shortest, open_tokens)
        longest = max(longest, open_tokens)
    documents = int(histogram.sum())
    return DocumentLengths(
        documents=documents,
        shortest=shortest or 0,
        longest=longest,
        mean=manifest.tokens / documents,
        histogram=tuple(int(n) for n in np.trim_zeros(histogram, "b")),
    )


def _lengths_by_block(
    manifest: Manifest, tick: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, int]]:
    """Lengths of the documents that end in a block, and tokens of the one left open."""
    open_tokens = 0
    for index in range(len(manifest.shards)):
        for block in shard_blocks(manifest, index):
            ends = np.flatnonzero(block == manifest.separator_id) + 1
            lengths = np.diff(ends, prepend=-open_tokens)
            open_tokens = (
                block.size - int(ends[-1]) if ends.size else open_tokens + block.size
            )
            yield lengths, open_tokens
            tick(block.size)


@dataclass(frozen=True)
class Document:
    """One document: its shard, its first token within it, and its tokens, 1-D."""

    shard: str
    start: int
    tokens: np.ndarray


def sample_documents(manifest: Manifest, count: int, seed: int) -> Iterator[Document]:
    """Documents at random tokens of the set: long ones are more likely.

    A document that runs over the end of a shard is cut there; the separator is left
    out.

    Raises:
        DataError: a shard is missing or damaged.
    """
    draw = np.random.default_rng(seed)
    positions = np.sort(draw.integers(0, manifest.tokens, count))
    offsets = np.cumsum([0, *(shard.tokens for shard in manifest.shards)])
    held: tuple[int, np.ndarray] | None = None
    for position in positions:
        index = int(np.searchsorted(offsets, position, side="right")) - 1
        if held is None or held[0] != index:
            held = (index, read_shard(manifest, index))
        tokens = held[1]
        ends = np.flatnonzero(tokens == manifest.separator_id)
        after = int(np.searchsorted(ends, position - offsets[index]))
        start = int(ends[after - 1]) + 1 if after else 0
        stop = int(ends[after]) if after < ends.size else tokens.size
        yield Document(manifest.shards[index].name, start, tokens[start:stop])

"""What is in a token set: lengths of its documents, some of them, and its token counts.

A document is the tokens up to and including a separator; the last may lack one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ten_dist.data.manifest import Manifest
from ten_dist.data.shards import COUNTED, read_shard, shard_blocks, token_ids


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
    manifest: Manifest, tick: Callable[[int], object] = lambda tokens: None
) -> DocumentLengths:
    """Measure all documents, reading every shard once.

    ``tick`` is told of the tokens of each block that has been read.

    Raises:
        DataError: a shard is missing or damaged.
    """
    histogram = np.zeros(64, dtype=np.int64)
    shortest, longest = manifest.tokens, 0
    for lengths in _lengths_by_block(manifest, tick):
        # The exponent of the power of two that is not below a length.
        histogram += np.bincount(np.frexp(lengths - 1)[1], minlength=64)
        shortest = int(lengths.min(initial=shortest))
        longest = int(lengths.max(initial=longest))
    documents = int(histogram.sum())
    return DocumentLengths(
        documents=documents,
        shortest=shortest,
        longest=longest,
        mean=manifest.tokens / documents,
        histogram=tuple(int(n) for n in np.trim_zeros(histogram, "b")),
    )


def _lengths_by_block(
    manifest: Manifest, tick: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """Lengths of the documents that end in each block, then of the one left open."""
    open_tokens = 0
    for block in _blocks(manifest):
        ends = np.flatnonzero(block == manifest.separator_id) + 1
        yield np.diff(ends, prepend=-open_tokens)
        open_tokens = (
            block.size - int(ends[-1]) if ends.size else open_tokens + block.size
        )
        tick(block.size)
    if open_tokens:
        yield np.array([open_tokens])


def _blocks(manifest: Manifest) -> Iterator[np.ndarray]:
    for index in range(len(manifest.shards)):
        for block in shard_blocks(manifest, index):
            yield token_ids(block, manifest.masked)


@dataclass(frozen=True)
class Document:
    """One document: its shard, its first token within it, its tokens, 1-D, and of a set
    with a loss mask which of them count, bool 1-D."""

    shard: str
    start: int
    tokens: np.ndarray
    counted: np.ndarray | None


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
        stored = held[1]
        tokens = token_ids(stored, manifest.masked)
        ends = np.flatnonzero(tokens == manifest.separator_id)
        after = int(np.searchsorted(ends, position - offsets[index]))
        start = int(ends[after - 1]) + 1 if after else 0
        stop = int(ends[after]) if after < ends.size else tokens.size
        counted = (stored[start:stop] & COUNTED) != 0 if manifest.masked else None
        yield Document(manifest.shards[index].name, start, tokens[start:stop], counted)


def token_counts(manifest: Manifest) -> np.ndarray:
    """How often each token id occurs in a set, int64 [vocab_size].

    Raises:
        DataError: a shard is missing or damaged.
    """
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for block in _blocks(manifest):
        counts += np.bincount(block, minlength=manifest.vocab_size)
    return counts


def unigram_loss(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Cross-entropy, in nats per token, of an add-one-smoothed unigram model.

    Args:
        train_counts: int64 [vocab_size], what the model is estimated from.
        val_counts: int64 [vocab_size], what it is scored on.

    Raises:
        ValueError: the two are of different vocabularies, or there is nothing to score.
    """
    if train_counts.shape != val_counts.shape:
        raise ValueError(
            f"counts of {train_counts.size} and {val_counts.size} token ids cannot be "
            "compared"
        )
    total = int(val_counts.sum())
    if total == 0:
        raise ValueError("there are no tokens to score")
    smoothed = train_counts.astype(np.float64) + 1.0
    log_probabilities = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(val_counts * log_probabilities).sum() / total)

"""The unigram model: what a language model that ignores context would score."""

from __future__ import annotations

import numpy as np

from ten_dist.data.manifest import Manifest
from ten_dist.data.shards import shard_blocks


def token_counts(manifest: Manifest) -> np.ndarray:
    """How often each token id occurs in a set, int64 [vocab_size].

    Raises:
        DataError: a shard is missing or damaged.
    """
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for index in range(len(manifest.shards)):
        for block in shard_blocks(manifest, index):
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

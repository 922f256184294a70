"""Encoding in threads, while the thread that asked reads on and writes what is done.

The tokenizer keeps all cores busy with one batch of texts until it comes to the last and
longest of them; so a second batch is under way at the same time. Results come in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ten_dist.data.tokenizer import TextTokenizer

K = TypeVar("K")

BATCH_CHARACTERS = 1 << 19
"""Characters from which a batch is full."""
_BATCHES_AT_ONCE = 2
_BATCHES_AHEAD = 3


def encode_in_order(
    texts: Iterable[tuple[K, str | None]], tokenizer: TextTokenizer
) -> Iterator[list[tuple[K, np.ndarray]]]:
    """Encode texts, each with a key; None stands for the separator.

    ``texts`` is read in the calling thread, a few batches ahead of what is yielded.

    Args:
        texts: (key, text or None), in order.
        tokenizer: the tokenizer.

    Yields:
        (key, tokens) of each text, in the same order, a batch at a time; tokens are 1-D
        uint32.
    """
    with ThreadPoolExecutor(_BATCHES_AT_ONCE, "encode") as threads:
        under_way: deque = deque()
        for batch in _batches(texts):
            if len(under_way) == _BATCHES_AHEAD:
                yield under_way.popleft().result()
            under_way.append(threads.submit(_encode, tokenizer, batch))
        for encoded in under_way:
            yield encoded.result()


def _batches(
    texts: Iterable[tuple[K, str | None]],
) -> Iterator[list[tuple[K, str | None]]]:
    batch, characters = [], 0
    for key, text in texts:
        batch.append((key, text))
        characters += len(text or "")
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _encode(
    tokenizer: TextTokenizer, batch: list[tuple[K, str | None]]
) -> list[tuple[K, np.ndarray]]:
    encoded = iter(tokenizer.encode([text for _, text in batch if text is not None]))
    separator = np.array([tokenizer.separator_id], dtype=np.uint32)
    return [(key, separator if text is None else next(encoded)) for key, text in batch]

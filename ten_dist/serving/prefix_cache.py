"""States by prompt: what several prompts begin with is read once."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

from ten_dist.model.network import NetworkState
from ten_dist.model.state import state_bytes


class PrefixCache:
    """The states that were used last, up to a number of bytes. Not for several threads.

    A state is as large after a million tokens as after one, so that a conversation of any
    length takes one entry.

    Args:
        most_bytes: of all states together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        # By the hash of the tokens; the least recently used one first.
        self._states: OrderedDict[bytes, tuple[int, NetworkState]] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.bytes = 0
        """Bytes of all states."""
        self.hits = 0
        """Prompts of which a beginning was known."""
        self.tokens_saved = 0
        """Tokens that need not be read, of all these prompts."""

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, NetworkState | None]:
        """How many of the first tokens the longest known prefix has, and its state."""
        lengths = sorted(length for length in self._lengths if length <= len(tokens))
        keys = list(_keys(tokens, lengths))
        for length, key in reversed(list(zip(lengths, keys, strict=True))):
            if key in self._states:
                self._states.move_to_end(key)
                self.hits += 1
                self.tokens_saved += length
                return length, self._states[key][1]
        return 0, None

    def put(self, tokens: Sequence[int], state: NetworkState) -> None:
        """Remember the state of one row that has read these tokens."""
        size = state_bytes(state)
        (key,) = _keys(tokens, [len(tokens)])
        if size > self._most_bytes or key in self._states:
            return
        self._states[key] = (len(tokens), state)
        self._lengths[len(tokens)] += 1
        self.bytes += size
        while self.bytes > self._most_bytes:
            _, (length, oldest) = self._states.popitem(last=False)
            self.bytes -= state_bytes(oldest)
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    """A hash of the first tokens for each of some increasing lengths."""
    content = memoryview(array("Q", tokens)).cast("B")
    digest, done = hashlib.blake2b(digest_size=16), 0
    for length in lengths:
        digest.update(content[8 * done : 8 * length])
        done = length
        yield digest.copy().digest()

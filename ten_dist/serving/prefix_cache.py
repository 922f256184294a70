"""States by prompt: what several prompts begin with is read once."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import torch

from ten_dist.model.network import NetworkState
from ten_dist.model.state import named_leaves, of_named_leaves


class PrefixCache:
    """The states that were used last, in memory of fixed size. Not for several threads.

    A state is as large after a million tokens as after one, so that a conversation of any
    length takes one slot. All slots are one tensor, made when the first state comes: small
    tensors that live long among large ones that do not would hold far more memory than they
    have. States of another shape than the first, as those of attention, are not kept.

    Args:
        most_bytes: of all states together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        # By the hash of the tokens, how many these are and the slot; the least recently
        # used one first.
        self._known: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._slots: _Slots | None = None
        self.hits = 0
        """Prompts of which a beginning was known."""
        self.tokens_saved = 0
        """Tokens that need not be read, of all these prompts."""

    @property
    def bytes(self) -> int:
        """Bytes of the states that are known."""
        return 0 if self._slots is None else len(self._known) * self._slots.size

    @torch.inference_mode()
    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, NetworkState | None]:
        """How many of the first tokens the longest known prefix has, and its state."""
        lengths = sorted(length for length in self._lengths if length <= len(tokens))
        keys = list(_keys(tokens, lengths))
        for length, key in reversed(list(zip(lengths, keys, strict=True))):
            if key in self._known:
                assert self._slots is not None, "there is a state"
                self._known.move_to_end(key)
                self.hits += 1
                self.tokens_saved += length
                return length, self._slots.read(self._known[key][1])
        return 0, None

    @torch.inference_mode()
    def put(self, tokens: Sequence[int], state: NetworkState) -> None:
        """Remember the state of one row that has read these tokens."""
        if self._slots is None:
            self._slots = _Slots(state, self._most_bytes)
        (key,) = _keys(tokens, [len(tokens)])
        if key in self._known or not self._slots.fits(state):
            return
        slot = len(self._known)
        if slot == self._slots.count:
            _, (length, slot) = self._known.popitem(last=False)
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]
        self._slots.write(slot, state)
        self._known[key] = (len(tokens), slot)
        self._lengths[len(tokens)] += 1


class _Slots:
    """Memory for a number of states of one shape.

    Args:
        like: a state of that shape.
        most_bytes: of all.
    """

    def __init__(self, like: NetworkState, most_bytes: int) -> None:
        self._like = like
        self._shapes = _shapes(like)
        self._sizes = [leaf.nbytes for _, leaf in named_leaves(like)]
        self.size = sum(self._sizes)
        """Bytes of a state."""
        self.count = most_bytes // self.size
        """How many states there is room for."""
        device = next(leaf.device for _, leaf in named_leaves(like) if leaf.ndim)
        memory = torch.empty(self.count, self.size, dtype=torch.uint8, device=device)
        # Written to, it is there from now on: a server that runs out of memory does so early.
        self._memory = memory.fill_(0)

    def fits(self, state: NetworkState) -> bool:
        """Whether there is room for such a state at all."""
        return self.count > 0 and _shapes(state) == self._shapes

    def write(self, slot: int, state: NetworkState) -> None:
        """Put a state into a slot."""
        parts = self._memory[slot].split(self._sizes)
        for part, (_, leaf) in zip(parts, named_leaves(state), strict=True):
            part.copy_(leaf.reshape(-1).view(torch.uint8))

    def read(self, slot: int) -> NetworkState:
        """A copy of the state in a slot."""
        parts = self._memory[slot].split(self._sizes)
        leaves = {
            name: part.clone().view(leaf.dtype).reshape(leaf.shape)
            for part, (name, leaf) in zip(parts, named_leaves(self._like), strict=True)
        }
        return of_named_leaves(leaves, self._like)


def _shapes(state: NetworkState) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, leaf.shape, leaf.dtype) for name, leaf in named_leaves(state)]


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    """A hash of the first tokens for each of some increasing lengths."""
    content = memoryview(array("Q", tokens)).cast("B")
    digest, done = hashlib.blake2b(digest_size=16), 0
    for length in lengths:
        digest.update(content[8 * done : 8 * length])
        done = length
        yield digest.copy().digest()

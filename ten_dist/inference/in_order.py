"""Completions of any number of requests, a few at once, given out in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from ten_dist.generation import Decoder, Request
from ten_dist.generation.completion import Completion

Item = TypeVar("Item")

_WINDOW = 16
"""Requests that may have begun before the oldest has ended, as a multiple of those at once:
what is complete waits in memory for those before it."""


class Piece(NamedTuple, Generic[Item]):
    """A piece of the text of the oldest request that has not been given out in whole."""

    item: Item
    completion: Completion
    text: str
    last: bool
    """Whether it is the last of its request."""


class _Entry(Generic[Item]):
    def __init__(self, item: Item, completion: Completion) -> None:
        self.item = item
        self.completion = completion
        self.pieces: list[str] = []
        self.ended = False

    def advance(self) -> None:
        self.pieces.append(self.completion.take())
        self.ended = self.completion.finish_reason is not None

    def piece(self) -> Piece[Item]:
        """What has come since the last call."""
        text = "".join(self.pieces)
        self.pieces = []
        return Piece(self.item, self.completion, text, self.ended)


def completed_in_order(
    decoder: Decoder,
    requests: Iterable[tuple[Item, Request]],
    decode: Callable[[Sequence[int]], str],
    stop: Sequence[str],
    batch_size: int,
) -> Iterator[Piece[Item]]:
    """Complete requests: the text of each as it comes, once that of those before is out.

    Args:
        decoder: has no other requests.
        requests: each with what stands for it in the pieces; read when there is room.
        decode: the text of a sequence of token ids.
        stop: texts that end a completion, and do not belong to it.
        batch_size: most requests at once.
    """
    coming = iter(requests)
    entries: deque[_Entry[Item]] = deque()
    more = True
    while True:
        while (
            more and len(decoder) < batch_size and len(entries) < _WINDOW * batch_size
        ):
            found = next(coming, None)
            if found is None:
                more = False
            else:
                item, request = found
                completion = Completion(decoder, request, decode, stop)
                entries.append(_Entry(item, completion))
        if not entries:
            return
        decoder.step()
        for entry in entries:
            if not entry.ended:
                entry.advance()
        while entries:
            yield (piece := entries[0].piece())
            if not piece.last:
                break
            entries.popleft()

"""Prompts of which several samples are drawn, each read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ten_dist.model.network import NetworkState


class SharedPrompts:
    """A :class:`ten_dist.generation.decoder.StateCache` of whole prompts.

    Args:
        capacity: prompts at once; of more, the one expected the longest ago is forgotten.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._states: OrderedDict[tuple[int, ...], NetworkState | None] = OrderedDict()

    def expect(self, prompt: Sequence[int]) -> None:
        """Keep the state of this prompt when it has been read."""
        self._states.setdefault(tuple(prompt[:-1]))
        if len(self._states) > self._capacity:
            self._states.popitem(last=False)

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, NetworkState | None]:
        """All of the tokens and their state, or none of them."""
        state = self._states.get(tuple(tokens))
        return (0, None) if state is None else (len(tokens), state)

    def put(self, tokens: Sequence[int], state: NetworkState) -> None:
        """Keep the state of an expected prompt; others are not kept."""
        if (key := tuple(tokens)) in self._states:
            self._states[key] = state

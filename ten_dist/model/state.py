"""States of networks as values: put together, taken apart, counted.

What a network carries from token to token is a tree of named tuples, lists, tensors whose
first dimension is the row, and positions (see :class:`ten_dist.model.network.NetworkState`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def join_states(states: Sequence[State]) -> State:
    """The states of some rows as one, rows in order; each row keeps its own position.

    Not of attention, whose states grow: they are of equal size for equal lengths alone.
    """
    return _combined(_join, states)


def select_rows(state: State, rows: Sequence[int]) -> State:
    """A copy of the state of some rows, in the order given."""
    index = torch.tensor(rows, dtype=torch.int64)

    def select(parts: Sequence[Tensor | int]) -> Tensor | int:
        (part,) = parts
        if not isinstance(part, Tensor):
            return part
        return part.index_select(0, index.to(part.device))

    return _combined(select, [state])


def row_of(state: State, row: int) -> State:
    """A copy of the state of one row, to which pieces of any length can be given."""

    def select(parts: Sequence[Tensor | int]) -> Tensor | int:
        (part,) = parts
        if not isinstance(part, Tensor):
            return part
        # Of the tensors, positions alone are numbers that Python computes with.
        return (
            int(part[row]) if part.dtype == torch.int64 else part[row : row + 1].clone()
        )

    return _combined(select, [state])


def empty_like(state: State) -> State:
    """The state before the first token, of as many rows as `state` has."""

    def empty(parts: Sequence[Tensor | int]) -> Tensor | int:
        (part,) = parts
        return torch.zeros_like(part) if isinstance(part, Tensor) else 0

    return _combined(empty, [state])


def state_bytes(state: object) -> int:
    """Bytes of the tensors of a state."""
    return sum(leaf.nbytes for leaf in state_tensors(state))


def state_tensors(state: object) -> Iterator[Tensor]:
    """The tensors of a state, in an order that depends on the model alone."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, list)):
        for part in state:
            yield from state_tensors(part)


def named_leaves(state: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state by their places in it, such as `blocks.0.mixer`; a position of
    all rows is an int64 without dimensions."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, int):
        yield name, torch.tensor(state)
    elif isinstance(state, (tuple, list)):
        places = getattr(state, "_fields", range(len(state)))
        for place, part in zip(places, state, strict=True):
            yield from named_leaves(part, f"{name}.{place}" if name else f"{place}")


def of_named_leaves(leaves: Mapping[str, Tensor], like: State) -> State:
    """The state that :func:`named_leaves` gave, of the structure of another.

    Raises:
        KeyError: there is no leaf for a place of it.
    """
    places = iter([name for name, _ in named_leaves(like)])

    def leaf(parts: Sequence[Tensor | int]) -> Tensor | int:
        found = leaves[next(places)]
        return found if isinstance(parts[0], Tensor) else int(found)

    return _combined(leaf, [like])


def _join(parts: Sequence[Tensor | int]) -> Tensor:
    tensors = [
        part if isinstance(part, Tensor) else torch.tensor([part]) for part in parts
    ]
    return torch.cat(tensors)


def _combined(function: Callable[[Sequence[Any]], Any], states: Sequence[Any]) -> Any:
    """The tree of what `function` makes of the leaves at one place of the states."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, (tuple, list)):
        parts = [_combined(function, leaves) for leaves in zip(*states, strict=True)]
        # A named tuple takes its fields one by one.
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return function(states)

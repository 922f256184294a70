"""Who watches the scans of a block: their arguments, and the states that they gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from torch import Tensor

from ten_dist.recurrence.inputs import ScanInputs


class ScanObserver(Protocol):
    """Something that is shown every scan, but those of levels that restart with a block."""

    def see(self, inputs: ScanInputs, states: Tensor, column: int = 0) -> None:
        """Take in a scan: its arguments, and the states [B, T, 2K] that it gave.

        Of eigenstates that carry vectors the entries at each place are a scan; `column` is
        the place, and they come in order, from 0 on.
        """


_Observer = TypeVar("_Observer", bound=ScanObserver)
_observer: ScanObserver | None = None


def current_observer() -> ScanObserver | None:
    """Who watches the scans of this block, if anybody does."""
    return _observer


@contextlib.contextmanager
def observed(observer: _Observer) -> Iterator[_Observer]:
    """Show an observer all scans of a block, which must not be compiled.

    A network runs those of its layers in order, and in a layer those of its scales.
    """
    global _observer
    _observer = observer
    try:
        yield observer
    finally:
        _observer = None


class InTurn:
    """Shows each scan of one forward pass to an observer of its own."""

    def __init__(self, observers: Iterable[ScanObserver]) -> None:
        self._observers = iter(observers)
        self._current: ScanObserver

    def see(self, inputs: ScanInputs, states: Tensor, column: int = 0) -> None:
        """Show a scan, with all its columns, to the next observer."""
        if column == 0:
            self._current = next(self._observers)
        self._current.see(inputs, states, column)

"""Values that take long to get, got by a thread before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class Prefetch(Generic[V]):
    """A thread gets values by key, in the order in which they are said to be needed.

    It holds them until they are dropped or no longer expected. There is one, so that it
    leaves the network to whoever needs a value now; it ends when there is no more to get.
    One thread, the owner, calls the methods.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, Future[V]] = {}
        self._actions: dict[Hashable, Callable[[], V]] = {}
        # For whoever holds the lock.
        self._lock = threading.Lock()
        self._to_get: list[tuple[Future[V], Callable[[], V]]] = []
        self._getting = False

    def expect(self, actions: Mapping[Hashable, Callable[[], V]]) -> None:
        """Get the values of these keys, each by its action, and let go of all others.

        What is there or under way already is not begun anew.
        """
        self._actions = dict(actions)
        self._values = {key: self._values.get(key) or Future() for key in actions}
        with self._lock:
            self._to_get = [(self._values[key], actions[key]) for key in actions]
            if self._to_get and not self._getting:
                self._getting = True
                # A daemon: a server that stalls holds up nobody's end.
                threading.Thread(target=self._get_all, daemon=True).start()

    def get(self, key: Hashable) -> V | None:
        """The value of a key, now; None if it is not expected.

        Waits for it where it is under way, and else gets it in this thread: a failure
        of before may be over. Raises what its action raises.
        """
        value = self._values.get(key)
        if value is None:
            return None
        if value.cancel() or (value.done() and value.exception() is not None):
            value = self._values[key] = Future()
            _get(value, self._actions[key])
        return value.result()

    def drop(self, key: Hashable) -> None:
        """Let go of the value of a key, if it has one."""
        self._values.pop(key, None)

    def close(self) -> None:
        """Let go of all, and get no more than what is under way."""
        self.expect({})

    def _get_all(self) -> None:
        while True:
            with self._lock:
                if not self._to_get:
                    self._getting = False
                    return
                value, action = self._to_get.pop(0)
            _get(value, action)


def _get(value: Future[V], action: Callable[[], V]) -> None:
    """Set a value, unless it is there, under way in another thread, or cancelled."""
    if value.done() or not value.set_running_or_notify_cancel():
        return
    try:
        value.set_result(action())
    except BaseException as error:  # noqa: BLE001 - whoever needs the value sees it
        value.set_exception(error)

"""Values that take long to get, got by a thread before they are needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")


class Prefetch(Generic[V]):
    """A thread gets values by key, in the order in which they are said to be needed.

    It holds them until they are dropped or no longer expected. There is one, so that it
    leaves the network to whoever needs a value now; it ends when there is no more to get.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, _Value[V]] = {}
        # The rest is for whoever holds the lock.
        self._lock = threading.Lock()
        self._to_get: list[Hashable] = []
        self._getting = False

    def expect(self, actions: Mapping[Hashable, Callable[[], V]]) -> None:
        """Get the values of these keys, each by its action, and let go of all others.

        What is there or under way already is not begun anew.
        """
        with self._lock:
            begun = self._values.keys() - self._to_get
            self._to_get = [key for key in actions if key not in begun]
            self._values = {
                key: self._values.get(key) or _Value(action)
                for key, action in actions.items()
            }
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
        return None if value is None else value.get()

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
                key = self._to_get.pop(0)
            # Whoever needs it will see what is wrong with it.
            with contextlib.suppress(Exception):
                self.get(key)


class _Value(Generic[V]):
    """A value that one thread gets while others that need it wait."""

    def __init__(self, action: Callable[[], V]) -> None:
        self._action = action
        self._lock = threading.Lock()
        self._value: V | None = None
        self._error: Exception | None = None

    def get(self) -> V:
        waited = self._lock.locked()
        with self._lock:
            if self._value is not None:
                return self._value
            if waited and self._error is not None:
                # All attempts have just been made.
                raise self._error
            try:
                self._value = self._action()
            except Exception as error:
                self._error = error
                raise
            return self._value

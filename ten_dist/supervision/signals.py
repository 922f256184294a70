"""Signals that the one who waits for a job passes on to it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.2


class SignalledJob(Protocol):
    """What signals are passed on to."""

    def poll(self) -> int | None:
        """Exit status, -N after signal N; None while it runs."""

    def send(self, number: int) -> None:
        """Pass a signal to the ranks."""

    def kill(self) -> None:
        """Kill every process of the job at once."""


class PassedSignals:
    """Passes SIGTERM, SIGINT, SIGHUP and SIGUSR1 on; only in the main thread.

    Args:
        tell: prints a line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._numbers: list[int] = []
        self._woken = threading.Event()

    @property
    def first(self) -> signal.Signals | None:
        """The first one that came, or None."""
        return signal.Signals(self._numbers[0]) if self._numbers else None

    @contextlib.contextmanager
    def caught(self) -> Iterator[PassedSignals]:
        """Keep the signals for :meth:`wait` while a block runs; yields this object."""

        def keep(number: int, _frame: object) -> None:
            self._numbers.append(number)
            self._woken.set()

        # What nohup has had ignored stays ignored.
        numbers = [n for n in _PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]
        before = [(number, signal.signal(number, keep)) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a signal comes."""
        self._woken.wait(seconds)

    def wait(self, job: SignalledJob, grace: float) -> int:
        """Wait for the end of a job, passing signals on; its exit status.

        Args:
            job: what is waited for.
            grace: seconds that it has to end after a signal, before it is killed; a
                second signal kills it at once.
        """
        passed_on, deadline = 0, math.inf
        while (status := job.poll()) is None:
            if self.first is not None and len(self._numbers) > passed_on:
                if passed_on:
                    self._tell(f"{self.first.name} again: the job is killed")
                    deadline = 0.0
                else:
                    self._tell(
                        f"{self.first.name}: passed on to the job, which has {grace:g} s "
                        "to end"
                    )
                    job.send(self.first)
                    deadline = time.monotonic() + grace
                passed_on = len(self._numbers)
            if time.monotonic() >= deadline:
                job.kill()
                deadline = math.inf
            self._woken.wait(_POLL_SECONDS)
            self._woken.clear()
        return status

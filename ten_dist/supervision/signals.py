"""Signals that the one who waits for a job passes on to it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # Python 3.10 has none.
    from typing import Self

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.2


class _Told(Protocol):
    """What signals are passed on to."""

    def poll(self) -> int | None: ...
    def send(self, number: int) -> None: ...
    def kill(self) -> None: ...


class PassedSignals:
    """Keeps SIGTERM, SIGINT, SIGHUP and SIGUSR1 from ending this process; a context
    manager, for the main thread.

    Args:
        tell: prints a line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._numbers: list[int] = []
        self._woken = threading.Event()
        self._before: dict[int, object] = {}

    @property
    def first(self) -> signal.Signals | None:
        """The first one that came, or None."""
        return signal.Signals(self._numbers[0]) if self._numbers else None

    def __enter__(self) -> Self:
        def keep(number: int, _frame: object) -> None:
            self._numbers.append(number)
            self._woken.set()

        for number in _PASSED_ON:
            # What nohup has had ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a signal comes."""
        self._woken.wait(seconds)

    def wait(self, job: _Told, grace: float) -> int:
        """Wait for the end of a job, passing signals on; its exit status.

        Args:
            job: what is waited for.
            grace: seconds that it has to end after a signal, before it is killed; a
                second signal kills it at once.
        """
        passed_on, deadline = 0, None
        while True:
            status = job.poll()
            if status is not None:
                return status
            if len(self._numbers) > passed_on:
                name = self.first.name
                if passed_on:
                    self._tell(f"{name} again: the job is killed")
                    deadline = 0.0
                else:
                    self._tell(
                        f"{name}: passed on to the job, which has {grace:g} s to end"
                    )
                    job.send(self._numbers[0])
                    deadline = time.monotonic() + grace
                passed_on = len(self._numbers)
            if deadline is not None and time.monotonic() >= deadline:
                job.kill()
                deadline = None
            self._woken.wait(_POLL_SECONDS)
            self._woken.clear()

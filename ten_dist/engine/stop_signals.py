"""Signals that ask a run to stop, and how they are obeyed.

After the first SIGTERM, SIGINT, SIGHUP or SIGUSR1 on any rank the current step is
finished; then all ranks save and end, and the run can be resumed. A process that has not
ended after the grace period ends without saving; SIGUSR1, which schedulers send well ahead,
has no grace period. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from ten_dist.console import complain
from ten_dist.engine.distributed import Ranks
from ten_dist.errors import EXIT_STOPPED

if TYPE_CHECKING:
    # Python 3.10 has none.
    from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# One Ctrl-C arrives twice: from the terminal, and from the launcher that had it as well.
_SAME_REQUEST_SECONDS = 1.0
_SIGNALLED = 128


class StopSignals:
    """Watches for signals while a block runs; only in the main thread.

    A thread handles them, since Python's own handlers would wait for the main thread,
    which may be inside of a collective that never ends.

    Args:
        grace_seconds: from SIGTERM, SIGINT or SIGHUP until the process ends in any case.
        speaks: whether this process announces what it does.
    """

    def __init__(self, grace_seconds: float, speaks: bool) -> None:
        self._grace_seconds = grace_seconds
        self._speaks = speaks
        self._first: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._first is not None

    def requested_of_any(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; all ranks must ask."""
        return ranks.largest(float(self.requested)) > 0

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
        for number in _SIGNALS:
            # nohup has had it ignored: a lost connection is no reason to stop.
            if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
                continue
            # The handler has nothing to do: the number itself goes to the socket.
            self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        # Ends the thread, and with it the period of grace.
        self._writer.close()

    def _watch(self) -> None:
        remaining: float | None = None
        with self._reader as reader:
            while True:
                reader.settimeout(remaining)
                try:
                    numbers = reader.recv(1)
                except TimeoutError:
                    complain(
                        f"not at the end of a step after {self._grace_seconds:g} s of "
                        "grace: stopping without saving, the newest checkpoint stays"
                    )
                    os._exit(EXIT_STOPPED)
                if not numbers:
                    return
                if numbers[0] not in _SIGNALS:
                    continue
                now = time.monotonic()
                if self._first is None:
                    self._first = now
                    if self._speaks:
                        complain(
                            f"{signal.Signals(numbers[0]).name}: this step is finished "
                            "and saved, then the run stops; a second signal stops it at "
                            "once"
                        )
                elif now - self._first > _SAME_REQUEST_SECONDS:
                    os._exit(_SIGNALLED + numbers[0])
                if numbers[0] != signal.SIGUSR1:
                    end = self._first + self._grace_seconds
                    remaining = max(0.001, end - now)

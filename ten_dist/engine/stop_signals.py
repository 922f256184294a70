"""Signals that ask a run to stop, and how they are obeyed.

After the first SIGTERM, SIGINT, SIGHUP or SIGUSR1 on any rank the current step is
finished; then all ranks save and end, and the run can be resumed. A process that has not
ended after the grace period ends without saving; SIGUSR1, which schedulers send well ahead,
has no grace period. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from ten_dist.console import complain
from ten_dist.engine.distributed import Ranks
from ten_dist.errors import EXIT_STOPPED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# One Ctrl-C arrives twice: from the terminal, and from the launcher that had it as well.
_SAME_REQUEST_SECONDS = 1.0
_SIGNALLED = 128


class StopSignals:
    """Watches for signals; only in the main thread.

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

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._first is not None

    def requested_of_any(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; all ranks must ask."""
        return ranks.largest(float(self.requested)) > 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[StopSignals]:
        """Watch while a block runs; yields this object."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno())
        before = {}
        for number in _SIGNALS:
            # nohup has had it ignored: a lost connection is no reason to stop.
            if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
                continue
            # The handler has nothing to do: the number itself goes to the socket.
            before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(
            target=self._watch, args=(reader,), name="signals", daemon=True
        ).start()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            # Ends the thread, and with it the period of grace.
            writer.close()

    def _watch(self, reader: socket.socket) -> None:
        remaining: float | None = None
        with reader:
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

"""Ending a process in which no Python can run any more.

A thread that holds the interpreter's lock and never gives it back stops every other
thread, the watchdog's too. What is left is what the C library does by itself: the
traceback of :mod:`faulthandler`, and a timer that calls ``_exit``.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import time

_SIGEV_THREAD = 2


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of Linux, 64 bytes."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal_number", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 40),
    ]


class LastResort:
    """Writes the stacks and ends this process, unless it is disarmed in time.

    Where the C library has no timers the process ends right after the stacks are written,
    with status 1.

    Args:
        status: exit status of the process.
    """

    def __init__(self, status: int) -> None:
        self._timer = ctypes.c_void_p()
        self._libc = None
        with contextlib.suppress(AttributeError, OSError, TypeError):
            libc = ctypes.CDLL(None)
            # The C library calls _exit(status) from a thread of its own.
            exit_function = ctypes.cast(libc._exit, ctypes.c_void_p).value
            event = _SignalEvent(status, 0, _SIGEV_THREAD, exit_function)
            timer, clock = ctypes.byref(self._timer), time.CLOCK_MONOTONIC
            if libc.timer_create(clock, ctypes.byref(event), timer) == 0:
                self._libc = libc

    def arm(self, seconds: float, grace: float, file: int) -> None:
        """Start the time anew.

        Args:
            seconds: until the stacks are written.
            grace: seconds from then until the process ends.
            file: descriptor of the file to append the stacks to.
        """
        ends_at_once = self._libc is None
        faulthandler.dump_traceback_later(seconds, exit=ends_at_once, file=file)
        self.end_after(seconds + grace)

    def end_after(self, seconds: float) -> None:
        """End the process in so many seconds, without stacks; 0 is never."""
        if self._libc is not None:
            nanoseconds = int(seconds * 1e9)
            # `struct itimerspec`: no repetition, then the time in two parts.
            times = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 1_000_000_000))
            self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def disarm(self) -> None:
        """Stop the time."""
        faulthandler.cancel_dump_traceback_later()
        self.end_after(0)

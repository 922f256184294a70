"""Ending a process in which no Python can run any more.

A thread that holds the interpreter's lock and never gives it back stops every other
thread, the watchdog's too. What is left is what the C library does by itself: the
traceback of :mod:`faulthandler`, and a timer that calls ``_exit``.
"""

from __future__ import annotations

import ctypes
import faulthandler

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` as Linux has it; 64 bytes there, the rest is spare."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal_number", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("spare", ctypes.c_char * 64),
    ]


class _TimerTimes(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = [
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    ]


class LastResort:
    """Writes the stacks and ends this process, unless it is told in time not to.

    Where the C library has no timers (macOS) the process ends right after the stacks
    are written, with status 1.

    Args:
        status: exit status of the process.
    """

    def __init__(self, status: int) -> None:
        self._timer = ctypes.c_void_p()
        self._libc = None
        try:
            libc = ctypes.CDLL(None)
            # The C library calls _exit(status) from a thread of its own.
            event = _SignalEvent(
                value=status,
                notify=_SIGEV_THREAD,
                function=ctypes.cast(libc._exit, ctypes.c_void_p).value,
            )
            if (
                libc.timer_create(
                    _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
                )
                == 0
            ):
                self._libc = libc
        except (AttributeError, OSError, TypeError):
            pass

    def arm(self, seconds: float, grace: float, file: int) -> None:
        """Begin to wait anew.

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
            whole = int(seconds)
            times = _TimerTimes(0, 0, whole, int((seconds - whole) * 1e9))
            self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def disarm(self) -> None:
        """Stop waiting."""
        faulthandler.cancel_dump_traceback_later()
        self.end_after(0)

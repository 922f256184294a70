"""SIGTERM and SIGHUP (a lost connection) as interrupts, so that what was begun is tidied up."""

from __future__ import annotations

import signal

from ten_dist.errors import EXIT_INTERRUPTED

_SIGNALLED = 128


class Terminated(KeyboardInterrupt):
    """A signal other than the keyboard's that ends this process."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def interrupt_on_termination() -> None:
    """Have SIGTERM and SIGHUP raise :class:`Terminated`, once; only in the main thread.

    A second one ends the process at once.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup has had ignored stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)


def interrupt_still() -> None:
    """Take the signals back from a library that has taken them in C, if they were ours."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _terminate:
            signal.signal(number, _terminate)


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """The status of a process that ends for an interrupt: 128 and the signal's number."""
    if isinstance(interrupt, Terminated):
        return _SIGNALLED + interrupt.number
    return EXIT_INTERRUPTED


def _terminate(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)

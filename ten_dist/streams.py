"""Standard output and error that take whatever is written to them.

A terminal may have another encoding than the text, be gone (a lost connection), or never
have been there; the reader of a pipe may have seen enough. None of it may end a training,
and none of it shows a traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO


def prepare_streams(keep_going: bool) -> None:
    """Make the standard streams of this process safe to write to.

    What an encoding has no place for is written as an escape sequence. A stream that was
    closed leads nowhere, and so does one that cannot be written to any more.

    Args:
        keep_going: whether the work matters more than what it prints: the standard
            output is then given up with a word on the standard error. Else the first
            write to it that fails raises ``OSError``. The standard error is given up
            without a word in any case.
    """
    _fill_closed_descriptors()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name, number, lasting in (("stdout", 1, keep_going), ("stderr", 2, True)):
        stream = _prepared(getattr(sys, name), number, lasting)
        for alias in (name, f"__{name}__"):
            setattr(sys, alias, stream)


def flush_streams() -> None:
    """Flush both standard streams.

    Raises:
        OSError: nobody takes it, see :func:`prepare_streams`.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _fill_closed_descriptors() -> None:
    """Open descriptors 0, 1 and 2 where they are closed: the next file to be opened would
    else get what C libraries and child processes print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


class _Output(io.FileIO):
    """A standard stream that leads nowhere once a write to it has failed."""

    def __init__(self, descriptor: int, keep_going: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._keep_going = keep_going

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                # Another program has made it non-blocking, and it is full.
                select.select([], [self], [])
            return written
        except OSError as error:
            # Of the whole process: libraries in C, and children from now on, write there.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not self._keep_going:
                # It does not say by itself which file that is.
                error.filename = "standard output"
                raise
            if self.fileno() == 1:
                words = f"standard output is gone ({error.strerror}): the work goes on"
                # Not through a buffer, out of which this may be called.
                with contextlib.suppress(OSError):
                    os.write(2, f"ten-dist: {words} without it\n".encode())
            return len(data)


def _prepared(stream: TextIO | None, descriptor: int, keep_going: bool) -> TextIO:
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, keep_going)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        # As python -u and PYTHONUNBUFFERED ask for.
        write_through=getattr(stream, "write_through", False),
    )

"""What each rank prints, in a file of its own: RUN/logs/start_NNN/rankNNNN.log."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

RANK_LOGS = "TEN_DIST_RANK_LOGS"
"""Environment variable of a rank: the folder that its log goes into."""
_POLL_SECONDS = 0.5
_TAIL_BYTES = 1 << 16


def rank_log(folder: Path, rank: int) -> Path:
    """File of a rank in the log folder of a start."""
    return folder / f"rank{rank:04d}.log"


def redirect_output(folder: Path, rank: int) -> None:
    """Send all that this process and those below it print into the file of its rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptor = os.open(rank_log(folder, rank), flags, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, oldest first; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # Of a progress bar, what was drawn last.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:] if count else []


class Follower:
    """Shows a log, which need not be there yet, at the terminal while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0
        self._last = b"\n"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show the rest, and end."""
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._show()
        self._show()
        if self._last != b"\n":
            # A progress bar was cut off, and another line comes.
            self._write(b"\n")

    def _show(self) -> None:
        # Opened anew each time: a network file system then looks for what is new.
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._position)
            while chunk := file.read(1 << 16):
                self._position += len(chunk)
                self._write(chunk)

    def _write(self, chunk: bytes) -> None:
        self._last = chunk[-1:]
        # Nobody listening is no reason to stop the job.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

"""supervisor.jsonl: one JSON object for every start, end and decision."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from ten_dist.errors import ConfigurationError


class SupervisorLog:
    """Appends to the log of a run's supervisors, and keeps other supervisors away.

    Args:
        path: the file; it and its folder are made if they are absent.

    Raises:
        ConfigurationError: it cannot be written, or another supervisor has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made_folder = not path.parent.exists()
        self._made_file = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"--output_dir {path.parent} cannot be written to: {error.strerror}"
            ) from None
        try:
            # Let go by the system when this process ends, however it does.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._file.close()
                raise ConfigurationError(
                    f"--output_dir {path.parent} has a supervisor already: one is enough"
                ) from None

    def write(self, event: str, **facts: Any) -> None:
        """Append an event with its time in UTC; it is on the disk when this returns."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.write(json.dumps({"time": at, "event": event, **facts}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and let others at it."""
        self._file.close()

    def withdraw(self) -> None:
        """Remove what this has made, after a job that was refused wrote nothing."""
        if self._made_file:
            self._path.unlink(missing_ok=True)
        if self._made_folder and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

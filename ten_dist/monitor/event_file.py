"""A file of TensorBoard events that sorts after the existing ones, whatever the clock says.

TensorBoard reads the files of a folder by their names, which begin with the time, and each
start of a run purges the steps that it does again. After the clock was set back the later
file would be read first, and its steps would be purged.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
# A clock that is wilder than that would leave no room in the ten digits of a name.
_LATEST = 9_999_000_000
_numbers = itertools.count()


class EventFile:
    """The events of one start of a run.

    Args:
        folder: of the events of all starts; made if it is absent.
        first_step: steps done before this start; events of later ones that are there are
            superseded.

    Raises:
        OSError: the file system refuses; so may all methods.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(open(folder / _next_name(folder), "xb"))  # noqa: SIM115
        self._write(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=first_step + 1, session_log=start))

    def show(self, step: int, summary: Summary) -> None:
        """Write what is no scalar."""
        self._write(Event(step=step, summary=summary))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step by their tags."""
        if scalars:
            values = [Summary.Value(tag=t, simple_value=v) for t, v in scalars.items()]
            self.show(step, Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        # Whoever looks sees every step, and a kill loses none.
        self._records.flush()


def _next_name(folder: Path) -> str:
    times = [int(m[1]) for m in map(_NAME.match, os.listdir(folder)) if m]
    now = min(max(int(time.time()), 0), _LATEST)
    after = max(now, max(times, default=-1) + 1)
    host, process = socket.gethostname(), os.getpid()
    return f"events.out.tfevents.{after:010d}.{host}.{process}.{next(_numbers)}"

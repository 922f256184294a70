"""The processes of a job on one host: started, watched, told and ended."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from ten_dist.supervision.job import (
    MARK,
    end_processes,
    is_alive,
    kill_processes,
    marked,
    rank_of,
    signal_ranks,
)

START = "TEN_DIST_START"
"""Environment variable of every process of one start of a job on one host. An agent ends no
others: one that has lost its launcher may still be there when the next start begins."""
_LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class NodeStart:
    """One host's part of a start."""

    command: list[str]
    """What starts its ranks."""
    environment: dict[str, str]
    """Variables of its ranks."""
    output: str
    """File for what `command` prints; ranks have logs of their own."""
    mark: str
    """Of the job, see :data:`ten_dist.supervision.job.MARK`."""
    start: str
    """Of this start on this host, see :data:`START`."""
    first_rank: int
    last_rank: int


class Node:
    """This host's part of a job."""

    def __init__(self, part: NodeStart) -> None:
        self._start = part.start
        self._expected = range(part.first_rank, part.last_rank + 1)
        self._ranks: dict[int, psutil.Process] = {}
        self._ended: list[int] = []
        self._looked = 0.0
        marks = {MARK: part.mark, START: part.start}
        with Path(part.output).open("ab") as file:
            self._process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **part.environment, **marks},
            )

    def poll(self) -> int | None:
        """Exit status of the command; None while it runs."""
        return self._process.poll()

    def ended_ranks(self) -> list[int]:
        """Ranks that have ended, in the order in which they did as far as it was seen."""
        unseen = len(self._ranks) < len(self._expected)
        if unseen and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._look()
        for rank, process in self._ranks.items():
            if rank not in self._ended and not is_alive(process):
                self._ended.append(rank)
        return self._ended

    def _look(self) -> None:
        self._looked = time.monotonic()
        for process in marked(self._start, START).values():
            rank = rank_of(process)
            if rank is None or rank not in self._expected:
                continue
            # Data workers of a rank have its variables, and are younger.
            older = self._ranks.get(rank, process)
            self._ranks[rank] = min(older, process, key=psutil.Process.create_time)

    def send(self, number: int) -> None:
        """Pass a signal to the ranks, or where there is none yet, to the command."""
        if not signal_ranks(self._start, number, START):
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill every process of the job on this host."""
        kill_processes(self._start, START)

    def end(self, grace: float) -> list[str]:
        """End what is left of the job on this host; see
        :func:`ten_dist.supervision.job.end_processes`."""
        ended = end_processes(self._start, grace, START)
        self._process.wait()
        return ended

    def abandon(self, seconds: float) -> None:
        """End this start, whose launcher has gone, giving the ranks `seconds` to save."""
        deadline = time.monotonic() + seconds
        if seconds and signal_ranks(self._start, signal.SIGTERM, START):
            while marked(self._start, START) and time.monotonic() < deadline:
                time.sleep(0.2)
        self.end(0.0)

"""What ranks leave in OUTPUT_DIR/hang/ when a run makes no progress.

`rankNNNN.txt` begins with one line that says where the rank is, kept up to date while it
runs and removed when it ends in order; below it come the stacks of a rank that hung.
`FIRST` is the report of the rank that noticed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import socket
import time
from pathlib import Path
from typing import TypeAlias

FIRST = "FIRST"
PHASES = (
    "start-up",
    "data",
    "forward",
    "backward",
    "optimizer",
    "validation",
    "checkpoint",
    "end",
)
"""In the order in which a rank passes through them."""
_LINE_BYTES = 200
_STACKS = "(most recent call first)"
_LINE = re.compile(
    rf"rank (?P<rank>\d+) of .*: (?P<phase>{'|'.join(PHASES)})(?: of step (?P<step>\d+))?"
    r" since (?P<since>[-\d]+ [:\d]+\.\d+) UTC"
)


@dataclasses.dataclass(frozen=True)
class HangReport:
    """Where one rank was when it last wrote its report."""

    rank: int
    phase: str
    """One of :data:`PHASES`."""
    step: int | None
    """The step at work, from 1; None where there is none."""
    since: str
    """When it entered the phase, in UTC: YYYY-MM-DD HH:MM:SS.mmm."""
    stacks: str
    """What follows the line; empty of a rank that ended without a report."""
    line: str
    """The line as it stands in the file."""


class ReportFile:
    """The report of this rank.

    Args:
        folder: OUTPUT_DIR/hang.
        rank, world_size: of this process and in all.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.path = folder / f"rank{rank:04d}.txt"
        self._prefix = (
            f"rank {rank} of {world_size} on {socket.gethostname()}, "
            f"process {os.getpid()}: "
        )
        self.line = ""
        """Where the rank is."""
        self.descriptor: int | None = None
        """Of the open file."""

    def open(self) -> None:
        """Make the file; the report of an earlier start becomes `rankNNNN.before.txt`.

        Raises:
            OSError: the file system refuses.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if _STACKS.encode() in self.path.read_bytes():
                os.replace(self.path, self.path.with_suffix(".before.txt"))
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.descriptor = os.open(self.path, flags, 0o644)
        # What is appended, perhaps by a signal handler in C, begins below the line.
        os.write(self.descriptor, self._padded_line())

    def update(self, phase: str, step: int | None, since: float) -> None:
        """Replace the first line; takes a few microseconds.

        A report that cannot be written is no reason to end a run.

        Args:
            phase, step: as in :class:`HangReport`.
            since: when the rank entered the phase, in seconds since 1970.
        """
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(since))
        at += f".{int(since * 1000) % 1000:03d}"
        of_step = "" if step is None else f" of step {step}"
        self.line = f"{self._prefix}{phase}{of_step} since {at} UTC"
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self.descriptor, self._padded_line(), 0)

    def _padded_line(self) -> bytes:
        return self.line.encode()[: _LINE_BYTES - 1].ljust(_LINE_BYTES - 1) + b"\n"

    def remove(self) -> None:
        """Remove the file of a rank that ends in order, and the folder once it is empty."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()


FileVersions: TypeAlias = dict[Path, tuple[int, int, int]]
"""Inode, size and time of change of files: the time alone may be set back."""


def report_versions(folder: Path) -> FileVersions:
    """The reports that are in OUTPUT_DIR/hang now, for :func:`read_reports` later."""
    versions = {}
    for path in folder.glob("rank" + "[0-9]" * 4 + ".txt"):
        with contextlib.suppress(OSError):
            found = path.stat()
            versions[path] = found.st_ino, found.st_size, found.st_mtime_ns
    return versions


def read_reports(folder: Path, before: FileVersions | None = None) -> list[HangReport]:
    """The reports of all ranks, that of the rank furthest behind first: others wait for it.

    Args:
        folder: OUTPUT_DIR/hang.
        before: leave out files that have not changed since these.
    """
    reports = []
    for path, version in report_versions(folder).items():
        if version == (before or {}).get(path):
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        line, _, stacks = text.partition("\n")
        if match := _LINE.match(line):
            reports.append(
                HangReport(
                    rank=int(match["rank"]),
                    phase=match["phase"],
                    step=int(match["step"]) if match["step"] else None,
                    since=match["since"],
                    stacks=stacks if _STACKS in stacks else "",
                    line=line.rstrip(),
                )
            )
    return sorted(reports, key=_position)


def _position(report: HangReport) -> tuple[float, int, str]:
    """By which ranks are ordered: how far each is in the run."""
    before_or_after = math.inf if report.phase == "end" else 0.0
    step = before_or_after if report.step is None else report.step
    return step, PHASES.index(report.phase), report.since

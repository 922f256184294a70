"""The watchdog: a run that makes no progress says where it is stuck, and ends.

Every rank watches itself. Where one is stuck, the others wait for it in a collective and
make no progress either, so each reports without any message between them. A rank that is
still at work when another reports finds `hang/FIRST` and reports as well: the launcher is
about to end it, and where it was is part of the evidence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

from ten_dist.errors import EXIT_HANG
from ten_dist.monitor.hang_reports import (
    FIRST,
    ReportFile,
    read_reports,
    report_versions,
)
from ten_dist.monitor.last_resort import LastResort

_LONGEST_BEAT_SECONDS = 5.0
_BEATS_PER_LIMIT = 20
_STANDARD_ERROR = 2


class Watchdog:
    """Watches this rank from a thread.

    The limit of the start-up also holds for the first step, validation and checkpoint of
    a start, which compile, allocate and connect.

    Args:
        folder: the run's; reports go to `hang/` in it.
        rank, world_size: of this process and in all.
        hang_timeout: seconds without progress that end a run; 0 is any number.
        startup_timeout: the same while it starts.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        hang_timeout: float,
        startup_timeout: float,
    ) -> None:
        self._folder = folder / "hang"
        self._rank = rank
        self._several = world_size > 1
        self._startup_timeout, self._hang_timeout = startup_timeout, hang_timeout
        self._first_steps: dict[str, int | None] = {}
        self._report = ReportFile(self._folder, rank, world_size)
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._working_together = False
        self._limit = 0.0
        self._reports_before = report_versions(self._folder)
        shortest = min(filter(None, (startup_timeout, hang_timeout)), default=0.0)
        self._beat = min(_LONGEST_BEAT_SECONDS, max(0.05, shortest / _BEATS_PER_LIMIT))
        # Long enough for the others to find `FIRST`, and for a rank that holds the
        # interpreter's lock to have its stacks written by the last resort.
        self._grace = 4 * self._beat + 2.0 if world_size > 1 else 0.0
        self.progress("start-up")
        if shortest:
            self._last_resort = LastResort(EXIT_HANG)
            self._thread = threading.Thread(
                target=self._watch, name="watchdog", daemon=True
            )
            self._thread.start()

    def progress(self, phase: str, step: int | None = None) -> None:
        """Say that this rank enters a phase, or goes on in it; microseconds.

        Args:
            phase: what it does from now on, one of `hang_reports.PHASES`.
            step: the step it works on, from 1; None outside of any.
        """
        first = step is None or step == self._first_steps.setdefault(phase, step)
        limit = self._startup_timeout if first else self._hang_timeout
        where = phase if step is None else f"{phase} of step {step}"
        self._state = where, time.monotonic(), limit
        if limit != self._limit:
            # What is armed for a rank that holds the interpreter's lock is now wrong.
            self._limit = limit
            self._wake.set()
        self._working_together |= step is not None
        self._report.update(phase, step, time.time())

    def open_report(self) -> None:
        """Make this rank's report in the run's folder; before the first step.

        Until then a hang is reported in a file made for it. The ranks must communicate
        between this and the first step.

        Raises:
            OSError: the file system refuses.
        """
        if self._thread is None:
            return
        if self._rank == 0:
            (self._folder / FIRST).unlink(missing_ok=True)
        self._report.open()

    def close(self) -> None:
        """Stop watching, and remove the report of a rank that did not hang."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._report.remove()

    def _watch(self) -> None:
        while True:
            self._wake.wait(self._beat)
            self._wake.clear()
            if self._closing:
                break
            _, since, limit = self._state
            stuck = limit and time.monotonic() - since >= limit
            if stuck or self._another_has_reported():
                self._end()
            if limit:
                descriptor = self._report.descriptor
                self._last_resort.arm(
                    limit + 2 * self._beat,
                    self._grace + self._beat,
                    _STANDARD_ERROR if descriptor is None else descriptor,
                )
            else:
                self._last_resort.disarm()
        self._last_resort.disarm()

    def _another_has_reported(self) -> bool:
        # During the start-up the file may still be one of an earlier start.
        return (
            self._several
            and self._working_together
            and self._report.descriptor is not None
            and (self._folder / FIRST).exists()
        )

    def _end(self) -> NoReturn:
        """Report, let the others report, and end this process and those below it."""
        # Should the file system be what hangs, or the error output be full.
        self._last_resort.disarm()
        self._last_resort.end_after(self._grace + 10 * self._beat + 1.0)
        where, since, limit = self._state
        waited = time.monotonic() - since
        words = f"no progress for {waited:.1f} s in {where}"
        if limit and waited >= limit:
            words += f" (limit {limit:g} s)"
        else:
            words += ", when another rank reported that it hangs"
        with contextlib.suppress(OSError):
            self._write(words)
        _print(
            f"ten-dist, rank {self._rank}: {words}: stacks in {self._report.path}, "
            f"ending with status {EXIT_HANG}"
        )
        first = self._is_first()
        time.sleep(self._grace)
        if first and self._several:
            # Of ranks that only an earlier, larger start had there may be files, too.
            for report in read_reports(self._folder, self._reports_before)[:1]:
                _print(f"ten-dist: furthest behind is {report.line}")
        _kill_descendants()
        _flush()
        os._exit(EXIT_HANG)

    def _write(self, words: str) -> None:
        if self._report.descriptor is None:
            self._report.open()
        assert self._report.descriptor is not None
        os.write(self._report.descriptor, f"{words}\n\n".encode())
        faulthandler.dump_traceback(self._report.descriptor, all_threads=True)

    def _is_first(self) -> bool:
        """Whether no other rank has reported yet; tells the others."""
        with contextlib.suppress(OSError):
            with open(self._folder / FIRST, "x", encoding="utf-8") as file:
                file.write(self._report.line + "\n")
            return True
        return False


def _print(line: str) -> None:
    # Not through sys.stderr: the thread that is stuck may hold its lock.
    with contextlib.suppress(OSError):
        os.write(_STANDARD_ERROR, f"\n{line}\n".encode())


def _kill_descendants() -> None:
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _flush() -> None:
    """Bring out what is printed, unless the thread that is stuck holds the lock."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1.0)

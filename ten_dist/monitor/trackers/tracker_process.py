"""A tracker as a training sees it: something that takes figures and never holds it up."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import ten_dist
from ten_dist.console import warn

_MOST_WAITING = 1000
"""Lines that wait for a tracker, beside what fits into the pipe."""
_SECONDS_AT_THE_END = 10.0
"""For what is left; less than the 25 s that a stopped run has by default."""


class TrackerProcess:
    """Passes figures on to a process of its own that knows the tracker.

    Nothing here raises or waits, but for :meth:`close`, and that for seconds. Where the
    tracker fails or falls behind, one line says so and training goes on.

    Args:
        name: of the tracker.
        project: that the run belongs to there.
        run: folder of the run, with its `config.json`.
    """

    def __init__(self, name: str, project: str, run: Path) -> None:
        self._name = name
        self._log = run / "trackers" / f"{name}.log"
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._left_out = 0
        self._failed = False
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = self._start(project, run)
        except OSError as error:
            self._fail(str(error))
            return
        self._thread = threading.Thread(
            target=self._pass_on, name="tracker", daemon=True
        )
        self._thread.start()

    def _start(self, project: str, run: Path) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(ten_dist.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        module = f"{__package__}.sender"
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, self._name, str(run), project],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                # What interrupts the training must not cut off what it has said.
                start_new_session=True,
            )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Have figures of a step passed on, by their tags; microseconds."""
        if self._failed or not figures:
            return
        try:
            self._lines.put_nowait(json.dumps([step, dict(figures)]) + "\n")
        except queue.Full:
            if not self._left_out:
                warn(
                    f"--tracker {self._name} is slower than the run: it gets no more than "
                    f"it can take, metrics.jsonl has all; see {self._log}"
                )
            self._left_out += 1

    def close(self) -> None:
        """Let the tracker take what is left, for some seconds."""
        process = self._process
        if process is None:
            return
        self._process = None
        end = time.monotonic() + _SECONDS_AT_THE_END
        try:
            self._lines.put(None, timeout=_SECONDS_AT_THE_END)
            self._thread.join(max(0.0, end - time.monotonic()))
            status = process.wait(max(0.0, end - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            _kill(process)
            self._fail(f"it did not end within {_SECONDS_AT_THE_END:g} s after the run")
            return
        if status:
            self._fail(self._last_words())
        if self._left_out:
            warn(f"--tracker {self._name} was not given {self._left_out:,} lines")

    def _pass_on(self) -> None:
        assert self._process is not None and self._process.stdin is not None
        process, pipe = self._process, self._process.stdin
        try:
            with pipe:
                while (line := self._lines.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except OSError:
            process.wait()
            self._fail(self._last_words())
            # Whoever waits to say that the run is over.
            while self._lines.get() is not None:
                pass

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            warn(
                f"--tracker {self._name} failed, training goes on without it: {reason} "
                f"({self._log})"
            )

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        return next(
            (line for line in reversed(lines) if line.strip()), "no reason known"
        )


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and those that the tracker's package has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()

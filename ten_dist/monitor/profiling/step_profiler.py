"""`--profile_steps`: a trace of some steps of one rank, and a table of it in words."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ten_dist.config.step_range import StepRange
from ten_dist.console import say, warn
from ten_dist.files import write_text
from ten_dist.monitor.profiling.table import STEP_PREFIX, Spent, describe

_MICROSECONDS = 1e6


class StepProfiler:
    """Traces the steps of a range that one start of a run does, once.

    Where a start begins in the middle of the range, or ends or goes back there, the files
    are named after the steps that were traced. Nothing that goes wrong here ends a run.

    Args:
        folder: `profile/` of the run; made when there is something to write.
        rank: of this process.
        steps: what is traced.
        done: steps done before this start.
    """

    def __init__(self, folder: Path, rank: int, steps: StepRange, done: int) -> None:
        self._folder, self._rank, self._steps = folder, rank, steps
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._traced: list[int] = []
        self._phases: Counter[str] = Counter()
        self._phase: tuple[str, float] | None = None
        self._over = done >= steps.last
        if self._over:
            say(
                f"--profile_steps {steps.first}:{steps.last} has no effect: {done:,} steps "
                "are done"
            )

    def begin_step(self, step: int) -> None:
        """Say that a step begins."""
        if self._over or step not in self._steps:
            return
        try:
            if self._profile is None:
                self._profile = start_profile()
            self._traced.append(step)
            self._step = record_function(f"{STEP_PREFIX}{step}")
            self._step.__enter__()
        except (OSError, RuntimeError) as error:
            self._give_up(error)

    def enter(self, phase: str) -> None:
        """Say that the step enters a phase."""
        if self._step is None:
            return
        now = time.perf_counter()
        self._end_phase(now)
        self._phase = (phase, now)

    def end_step(self, step: int) -> None:
        """Say that a step is done; after the last one of the range the files are written."""
        if self._step is None:
            return
        self._leave_step()
        if step >= self._steps.last:
            self.finish()

    def finish(self) -> None:
        """Write what was traced so far, and trace no more in this start."""
        self._leave_step()
        running, self._profile = self._profile, None
        if running is None:
            return
        self._over = True
        try:
            running.stop()
            self._write(running)
        except (OSError, RuntimeError) as error:
            self._give_up(error)

    def _leave_step(self) -> None:
        if self._step is not None:
            self._end_phase(time.perf_counter())
            self._step.__exit__(None, None, None)
            self._step = None

    def _end_phase(self, now: float) -> None:
        if self._phase is not None:
            phase, since = self._phase
            self._phases[phase] += int((now - since) * _MICROSECONDS)
            self._phase = None

    def _write(self, finished: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._traced[0], self._traced[-1]
        stem = f"rank{self._rank:04d}_steps_{first}_{last}"
        trace = self._folder / f"{stem}.json.gz"
        # torch compresses by the ending.
        temporary = self._folder / f"{stem}.partial.json.gz"
        try:
            finished.export_chrome_trace(str(temporary))
            os.replace(temporary, trace)
        finally:
            temporary.unlink(missing_ok=True)
        spent = Spent.of(list(finished.events()), self._phases)
        table = self._folder / f"{stem}.md"
        write_text(table, describe(spent, self._rank, self._traced))
        say(f"profile of steps {first} to {last}: {table}, and traces beside it")

    def _give_up(self, error: Exception) -> None:
        self._over, self._profile, self._step = True, None, None
        reason = " ".join(str(error).split())
        warn(f"--profile_steps gave no files, training goes on: {reason}")


def start_profile() -> profile:
    """A profile of processor and GPU, running."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    started = profile(activities=activities, acc_events=True)
    started.start()
    return started

"""Where a rank reports what it does: watchdog, ledger, and on rank 0 the monitor."""

from __future__ import annotations

import dataclasses
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from ten_dist.data import TokenBatch
from ten_dist.engine.stragglers import Stragglers
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.profiling.communication_share import CommunicationShare
from ten_dist.monitor.profiling.step_profiler import StepProfiler
from ten_dist.monitor.run_monitor import RunMonitor
from ten_dist.monitor.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Passes on what happens in training to those that this rank has."""

    watchdog: Watchdog | None = None
    """Ends a run that makes no progress."""
    stragglers: Stragglers | None = None
    """Compares the ranks."""
    monitor: RunMonitor | None = None
    """metrics.jsonl, TensorBoard and progress bar, of rank 0 only."""
    ledger: Ledger | None = None
    """Rows that this rank consumes, with `--ledger` only."""
    profiler: StepProfiler | None = None
    """Traces some steps, with `--profile_steps` only."""
    communication: CommunicationShare | None = None
    """Measures communication now and then, of rank 0 where there are others."""

    def progress(self, phase: str, step: int | None = None) -> None:
        """Say that this rank enters a phase, or goes on in it."""
        if self.watchdog is not None:
            self.watchdog.progress(phase, step)

    def begin_step(self, step: int) -> None:
        """Say that a step begins."""
        if self.profiler is not None:
            self.profiler.begin_step(step)
        if self.communication is not None:
            self.communication.begin_step(step)

    def enter(self, phase: str, step: int) -> None:
        """Say that a step enters a phase: data, forward, backward or optimizer."""
        self.progress(phase, step)
        if self.profiler is not None:
            self.profiler.enter(phase)
        if self.stragglers is not None:
            self.stragglers.enter(phase)

    def consumed(self, step: int, batch: TokenBatch) -> None:
        """Say that a micro-batch was taken for a step."""
        if self.ledger is not None:
            self.ledger.write(step, batch.sources, batch.epochs, batch.rows)

    def step(self, metrics: dict[str, Any]) -> None:
        """Report an optimizer step, by the names of metrics.jsonl; every rank must."""
        if self.profiler is not None:
            self.profiler.end_step(metrics["step"])
        if self.communication is not None:
            metrics = metrics | self.communication.end_step(metrics["step_seconds"])
        if self.stragglers is not None:
            seconds = metrics["step_seconds"]
            metrics = metrics | self.stragglers.end_step(metrics["step"], seconds)
        if self.monitor is not None:
            self.monitor.step(metrics)

    def record(self, metrics: dict[str, Any]) -> None:
        """Report a validation, a checkpoint or the recurrence, see
        :meth:`RunMonitor.record`."""
        if self.monitor is not None:
            self.monitor.record(metrics)

    def show(self, step: int, summary: Summary) -> None:
        """Show on TensorBoard what is no figure."""
        if self.monitor is not None:
            self.monitor.show(step, summary)

    def rewind(self, step: int, attempt: int) -> None:
        """Go on from an earlier step, as another start of the run."""
        if self.profiler is not None:
            self.profiler.finish()
        if self.monitor is not None:
            self.monitor.rewind(step)
        if self.ledger is not None:
            self.ledger.begin_attempt(attempt)

    def close(self) -> None:
        """Bring everything to the disk. The watchdog goes on."""
        if self.profiler is not None:
            self.profiler.finish()
        if self.monitor is not None:
            self.monitor.close()
        if self.ledger is not None:
            self.ledger.close()

"""Whoever is told what a rank does: the watchdog, its ledger, and on rank 0 the monitor."""

from __future__ import annotations

from typing import Any

from ten_dist.data import TokenBatch
from ten_dist.engine.stragglers import Stragglers
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import RunMonitor
from ten_dist.monitor.watchdog import Watchdog


class Reporter:
    """Passes on what happens in training to those that this rank has.

    Args:
        watchdog: ends a run that makes no progress.
        stragglers: compares the ranks.
        monitor: metrics.jsonl, TensorBoard and progress bar, of rank 0 only.
        ledger: rows that this rank consumes, with `--ledger` only.
    """

    def __init__(
        self,
        watchdog: Watchdog | None = None,
        stragglers: Stragglers | None = None,
        monitor: RunMonitor | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._watchdog = watchdog
        self._stragglers = stragglers
        self._monitor = monitor
        self._ledger = ledger

    def progress(self, phase: str, step: int | None = None) -> None:
        """Say that this rank enters a phase, or goes on in it."""
        if self._watchdog is not None:
            self._watchdog.progress(phase, step)

    def enter(self, phase: str, step: int) -> None:
        """Say that a step enters a phase: data, forward, backward or optimizer."""
        self.progress(phase, step)
        if self._stragglers is not None:
            self._stragglers.enter(phase)

    def consumed(self, step: int, batch: TokenBatch) -> None:
        """Say that a micro-batch was taken for a step."""
        if self._ledger is not None:
            self._ledger.write(step, batch.sources, batch.epochs, batch.rows)

    def step(self, metrics: dict[str, Any]) -> None:
        """Report an optimizer step, by the names of metrics.jsonl; every rank must."""
        if self._stragglers is not None:
            metrics = metrics | self._stragglers.end_step(
                metrics["step"], metrics["step_seconds"]
            )
        if self._monitor is not None:
            self._monitor.step(metrics)

    def validation(self, metrics: dict[str, Any]) -> None:
        """Report a validation; `metrics` has step, val_loss and what follows from it."""
        if self._monitor is not None:
            self._monitor.validation(metrics)

    def checkpoint(self, metrics: dict[str, Any]) -> None:
        """Report a complete checkpoint; `metrics` has step, seconds and bytes."""
        if self._monitor is not None:
            self._monitor.checkpoint(metrics)

    def health(self, metrics: dict[str, Any]) -> None:
        """Report the recurrence at a checkpoint; `metrics` has step and its figures."""
        if self._monitor is not None:
            self._monitor.health(metrics)

    def rewind(self, step: int, attempt: int) -> None:
        """Go on from an earlier step, as another start of the run."""
        if self._monitor is not None:
            self._monitor.rewind(step)
        if self._ledger is not None:
            self._ledger.begin_attempt(attempt)

    def total_dollars(self, step: int) -> float | None:
        """What the run has cost after `step` steps; None where that is not known."""
        return None if self._monitor is None else self._monitor.total_dollars(step)

    def close(self) -> None:
        """Bring everything to the disk. The watchdog goes on."""
        if self._monitor is not None:
            self._monitor.close()
        if self._ledger is not None:
            self._ledger.close()

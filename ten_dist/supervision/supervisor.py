"""The supervisor: start, watch, judge by what the run's folder says, start again."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_STOPPED,
    ConfigurationError,
)
from ten_dist.monitor.hang_reports import read_reports, report_versions
from ten_dist.monitor.metrics_log import read_metrics
from ten_dist.run_folder import RunFolder, checkpoint_step
from ten_dist.supervision.job import Jobs
from ten_dist.supervision.log import SupervisorLog
from ten_dist.supervision.policy import Policy, SupervisionConfig
from ten_dist.supervision.signals import PassedSignals

_SECONDS_FOR_LEFTOVERS = 10.0
_REASONS = {
    0: "ended with status 0, but the run is not complete",
    EXIT_CONFIGURATION_ERROR: "was refused with status 2",
    EXIT_STOPPED: "was stopped with status 3",
    EXIT_HANG: "hung and ended with status 4",
}


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far a run is between two starts."""

    completed: bool
    """Whether it has said so itself."""
    checkpoint: Path | None
    """What the next start continues from."""
    checkpoint_step: int
    """Steps of it; 0 where there is none."""
    last_step: int
    """The last step in the metrics, which may be after the checkpoint; 0 without any."""
    metrics_version: tuple[int, ...] | None
    """Differs after the metrics were written to; None where there are none."""

    def describe(self) -> str:
        """Where the next start begins, in words."""
        if self.checkpoint is None:
            return "initial weights"
        return f"{self.checkpoint.name}, {self.checkpoint_step:,} steps done"


def standing(folder: RunFolder) -> Standing:
    """Look into the folder of a run, or where it will be."""
    checkpoint = folder.newest_checkpoint()
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    last_step, version = 0, None
    if folder.metrics_file.is_file():
        found = folder.metrics_file.stat()
        # A start that continues makes the file anew, also where no line is different.
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        steps = [m["step"] for m in read_metrics(folder.metrics_file) if "step" in m]
        last_step = max(steps, default=0)
    return Standing(
        folder.completed_file.is_file(), checkpoint, step, last_step, version
    )


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One start of the job and how it ended."""

    number: int
    began: float
    seconds: float
    before: Standing
    after: Standing
    status: int
    reason: str | None
    hang: list[str]
    """The lines of the ranks, the one furthest behind first; empty if it did not hang."""
    last_lines: list[str]

    @property
    def failed_step(self) -> int | None:
        """The step after the last one that was done; None where none was begun."""
        # The metrics of the start before are kept until the next one opens them.
        started = self.after.metrics_version != self.before.metrics_version
        return self.after.last_step + 1 if started else None

    def describe(self) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.began))
        what = _REASONS.get(self.status, f"ended with status {self.status}")
        if self.status < 0:
            what = f"was ended by signal {-self.status}"
        if self.status > 192:
            # A launcher ends with the status of a rank, -N, cut down to a byte.
            what += f" (a process of it by signal {256 - self.status})"
        if self.reason is not None:
            what = f"ended: {self.reason},"
        if self.hang and self.status != EXIT_HANG:
            what = f"hung and {what}"
        step = self.failed_step
        where = "its start-up" if step is None else f"step {step:,}"
        return (
            f"start {self.number} of {at} from {self.before.describe()} {what} after "
            f"{self.seconds:,.0f} s in {where}"
        )


class Supervisor:
    """Runs a job until its run is complete.

    Args:
        jobs: starts it.
        output_dir: the run's folder.
        config: limits.
        name: what its lines begin with.
    """

    def __init__(
        self, jobs: Jobs, output_dir: Path, config: SupervisionConfig, name: str
    ) -> None:
        self._jobs = jobs
        self._folder = RunFolder(output_dir)
        self._config = config
        self._name = name
        self._attempts: list[_Attempt] = []
        self._signals = PassedSignals(self._tell)

    def run(self) -> int:
        """Supervise until the end; only from the main thread.

        Returns:
            Exit status: 0 the run is complete; 1 gave up; 2 the job was refused; 3 was
            told to stop by a signal, and the same command continues.

        Raises:
            ConfigurationError: the folder cannot be written to, another supervisor is at
                work in it, or the job cannot be started.
            TrainingError: processes of the job cannot be killed.
        """
        log = SupervisorLog(self._folder.supervisor_log)
        status = EXIT_CONFIGURATION_ERROR
        try:
            # Nothing runs yet that a signal would be for.
            leftovers = self._jobs.prepare(_SECONDS_FOR_LEFTOVERS)
            self._tell_leftovers(leftovers, "an earlier start")
            with self._signals.caught():
                status = self._supervise(log)
        except ConfigurationError as error:
            log.write("decision", action="refused", reason=str(error))
            raise
        finally:
            statuses = {status, *(attempt.status for attempt in self._attempts)}
            if statuses == {EXIT_CONFIGURATION_ERROR}:
                log.withdraw()
            log.close()
        return status

    def _supervise(self, log: SupervisorLog) -> int:
        now = standing(self._folder)
        policy = Policy(self._config, now.checkpoint_step)
        while True:
            attempt = self._attempt(log, now)
            before, now = now, attempt.after
            # A start that failed before it could extend a complete run changed nothing.
            if now.completed and not (before.completed and attempt.status):
                log.write("decision", action="done")
                self._tell(f"{self._folder.path} is complete")
                return 0
            if self._signals.first:
                return self._stopped(log, now, self._signals.first)
            decision = policy.decide(
                attempt.status, attempt.failed_step, now.checkpoint_step
            )
            log.write(
                "decision",
                action=decision.action,
                reason=decision.reason,
                delay_seconds=decision.delay,
            )
            if decision.action == "refused":
                self._tell(f"not started again: {attempt.reason or decision.reason}")
                return EXIT_CONFIGURATION_ERROR
            if decision.action == "give up":
                self._give_up(decision.reason)
                return EXIT_FAILED
            saved = max(now.checkpoint_step - before.checkpoint_step, 0)
            self._tell(
                f"{attempt.describe()}, {saved:,} new steps saved; "
                f"{decision.reason}, in {decision.delay:g} s, from {now.describe()}"
            )
            self._signals.sleep(decision.delay)
            if self._signals.first:
                return self._stopped(log, now, self._signals.first)

    def _attempt(self, log: SupervisorLog, before: Standing) -> _Attempt:
        """Start the job, wait for its end, and end what is left of it."""
        number, began = len(self._attempts) + 1, time.time()
        started_at = time.monotonic()
        reports_before = report_versions(self._folder.hang)
        log.write(
            "start",
            number=number,
            command=self._jobs.command,
            checkpoint=before.checkpoint and before.checkpoint.name,
            step=before.checkpoint_step,
        )
        self._tell(f"start {number} from {before.describe()}")
        job = self._jobs.start()
        try:
            status = self._signals.wait(job, self._config.grace)
        finally:
            leftovers = job.end(_SECONDS_FOR_LEFTOVERS)
        self._tell_leftovers(leftovers, "this start")
        reports = read_reports(self._folder.hang, reports_before)
        hung = any(report.stacks for report in reports)
        after = standing(self._folder)
        attempt = _Attempt(
            number,
            began,
            time.monotonic() - started_at,
            before,
            after,
            status,
            job.reason,
            [report.line for report in reports] if hung else [],
            job.last_lines(),
        )
        self._attempts.append(attempt)
        log.write(
            "end",
            number=number,
            seconds=round(attempt.seconds, 1),
            status=status,
            reason=attempt.reason,
            completed=after.completed,
            last_step=after.last_step,
            failed_step=None if after.completed else attempt.failed_step,
            checkpoint=after.checkpoint and after.checkpoint.name,
            hang=attempt.hang,
            left_behind=leftovers,
            last_lines=[] if after.completed else attempt.last_lines,
        )
        return attempt

    def _stopped(self, log: SupervisorLog, now: Standing, by: signal.Signals) -> int:
        log.write("decision", action="stopped", signal=by)
        self._tell(
            f"stopped by {by.name}; the same command continues from {now.describe()}"
        )
        return EXIT_STOPPED

    def _give_up(self, reason: str) -> None:
        """The evidence, in one piece."""
        lines = [f"giving up: {reason}"]
        lines += [f"  {attempt.describe()}" for attempt in self._attempts]
        last = self._attempts[-1]
        if last.hang:
            lines += ["the ranks of the last one, the one furthest behind first:"]
            lines += [f"  {line}" for line in last.hang]
            lines += [f"  stacks: {self._folder.hang}"]
        lines += ["the last lines that it printed:"]
        lines += [f"  {line}" for line in last.last_lines]
        lines += [f"all of it: {self._folder.supervisor_log}"]
        self._tell("\n".join(lines))

    def _tell(self, message: str) -> None:
        tell(self._name, message)

    def _tell_leftovers(self, leftovers: Sequence[str], of: str) -> None:
        if leftovers:
            self._tell(f"ended what was left of {of}: {', '.join(leftovers)}")


def tell(name: str, message: str) -> None:
    """Print a line of a supervisor; nobody may be listening."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{name}: {message}\n")
        sys.stderr.flush()

"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import deepspeed

from ten_dist.console import say
from ten_dist.data import TokenBatch, batch_of_step, training_batches
from ten_dist.engine.checkpointing.load import load_checkpoint, newest_whole
from ten_dist.engine.checkpointing.probe import run_probe
from ten_dist.engine.checkpointing.save import CheckpointWriter
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Anomaly, Health
from ten_dist.engine.loss_scale import LossScale
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.step import Stepper, StepResult
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.engine.stragglers import Stragglers
from ten_dist.engine.validation import Validation, ValidationStopped, readable
from ten_dist.errors import RunStoppedError, TrainingError
from ten_dist.files import write_json
from ten_dist.monitor.anomaly_log import log_anomaly
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import RunMonitor, SilentMonitor
from ten_dist.monitor.watchdog import NoWatchdog, Watchdog
from ten_dist.run_folder import RunFolder

_MOST_SKIPPED_IN_A_ROW = 10
_MOST_EXCLUDED_BATCHES = 100


class Trainer:
    """Runs the steps of a schedule on a DeepSpeed engine.

    Steps are counted from 1 in everything a user sees: step n is the n-th update, and a
    checkpoint of step n has done n of them.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        folder: RunFolder,
        writer: CheckpointWriter,
        stop: StopSignals,
        monitor: RunMonitor | SilentMonitor,
        ledger: Ledger | None,
        watchdog: Watchdog | NoWatchdog,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.run = run
        self.training = run.training
        self.schedule = run.schedule
        self.folder = folder
        self.writer = writer
        self.stop = stop
        self.monitor = monitor
        self.ledger = ledger
        self.watchdog = watchdog
        self.stragglers = Stragglers(
            ranks, run.training.straggler_interval, engine.device
        )
        self._validation = Validation(engine, ranks, run, stop, watchdog)
        self._stepper = Stepper(
            engine, ranks, run, stop, ledger, self._enter, writer.before_update
        )

    def fit(self, record: dict[str, Any]) -> dict[str, Any]:
        """Train to the end of the schedule.

        Args:
            record: of the checkpoint that was loaded, or an empty one at the start.

        Returns:
            Metrics of the last step and of the last validation.

        Raises:
            TrainingError: loss or gradient was wrong and `--on_anomaly` or the number of
                such steps ends the run, or a file cannot be read or written.
            RunStoppedError: a signal asked for it; all that was done is saved.
        """
        while True:
            try:
                return self._train_from(record)
            except _RollbackRequest as rollback:
                record = self._roll_back(rollback.batch)

    def _train_from(self, record: dict[str, Any]) -> dict[str, Any]:
        schedule = self.schedule
        done = record.get("step", 0)
        # The checkpoint may be another run's: this one then gets its own.
        own = self.ranks.from_first(bool(self.folder.all_checkpoints()))
        saved = done if own else 0
        self._final = dict(record.get("metrics", {}))
        self._excluded: list[int] = list(record.get("excluded_batches", []))
        self._health = Health(
            self.engine.device, self.training.spike_threshold, record.get("health", {})
        )
        self._loss_scale = None
        if self.training.precision == "fp16":
            self._loss_scale = LossScale(record.get("loss_scale") or {})
        batches = self._batches(done)
        stopping = self.stop.requested_of_any(self.ranks)
        try:
            # Stopped in the middle of a validation, the run makes up for it first.
            if self._validation_due(done) and self._final.get("validated_step") != done:
                self._validate(done)
            while done < schedule.steps and not stopping:
                result = self._stepper(
                    done + 1, batches, self._health, self._excluded, self._loss_scale
                )
                done += 1
                seconds = result.metrics["step_seconds"]
                metrics = result.metrics | self.stragglers.end_step(done, seconds)
                self.monitor.step(metrics)
                self._report_saved()
                self._final.update(result.metrics)
                stopping = result.stop_requested
                if result.overflowed:
                    self._say_overflow(done)
                if result.anomaly is not None:
                    self._respond(done, result.anomaly, result)
                if self._validation_due(done):
                    self._validate(done)
                last = done == schedule.steps
                if last or done % self.training.checkpoint_interval == 0:
                    self._save(done)
                    saved = done
        except ValidationStopped:
            stopping = True
        if saved < done:
            self._save(done)
        self.writer.wait()
        self._report_saved()
        if stopping:
            raise RunStoppedError(
                f"stopped after step {done:,} of {schedule.steps:,}, saved: the same command "
                "continues"
            )
        return self._final

    def _batches(self, done: int) -> Iterator[TokenBatch]:
        schedule, training = self.schedule, self.training
        return readable(
            training_batches(
                self.run.data,
                seq_len=schedule.seq_len,
                seed=training.seed,
                global_batch_size=schedule.global_batch_size,
                micro_batch_size=schedule.micro_batch_size,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                first_step=done,
                last_step=schedule.steps,
                num_workers=training.num_workers,
                excluded=self._excluded,
            )
        )

    def _save(self, step: int) -> None:
        self.watchdog.progress("checkpoint", step)
        probe = run_probe(self.engine, self.ranks, self.run)
        try:
            probe.check()
        except TrainingError as error:
            raise TrainingError(
                f"after step {step}, not saved: {error}. {self._way_on()}"
            ) from None
        self.monitor.health({"step": step, **probe.metrics()})
        read = batch_of_step(step, self._excluded)
        progress = {
            "consumed_rows": read * self.schedule.global_batch_size,
            "metrics": dict(self._final),
            "probe_loss": probe.loss,
            "excluded_batches": self._excluded,
            "health": self._health.state(),
        }
        if self._loss_scale is not None:
            progress["loss_scale"] = self._loss_scale.state()
        self.writer.save(
            step, progress, lambda: self.watchdog.progress("checkpoint", step)
        )

    def _report_saved(self) -> None:
        saved = self.writer.take_saved()
        if saved is not None:
            self.monitor.checkpoint(saved.metrics())

    def _say_overflow(self, step: int) -> None:
        """Say that an update was left out: of many overflows the 1st, 2nd, 4th, 8th..."""
        scale, number = self._loss_scale, self._loss_scale.overflowed_steps
        if number & (number - 1) == 0:
            say(
                f"step {step}: the gradient overflowed in float16 and was not applied, "
                f"the loss scale is now {scale.value:g}; {number} such steps so far"
            )

    def _respond(self, step: int, anomaly: Anomaly, result: StepResult) -> None:
        """Do what `--on_anomaly` says about a step.

        Raises:
            TrainingError: the run must end.
            _RollbackRequest: it must go back.
        """
        policy = self.training.on_anomaly
        batch = batch_of_step(step - 1, self._excluded)
        action = policy
        if policy == "skip" and anomaly.applied:
            action = "kept, clipped"
        facts = {
            "step": step,
            "batch": batch,
            "kind": anomaly.kind,
            "value": anomaly.value if math.isfinite(anomaly.value) else None,
            "z_score": anomaly.z_score,
            "action": action,
        }
        rows = [
            {
                "sources": taken.sources.tolist(),
                "epochs": taken.epochs.tolist(),
                "rows": taken.rows.tolist(),
            }
            for taken in result.rows
        ]
        by_rank = self.ranks.gather(rows)
        with self.ranks.agreeing():
            if self.ranks.is_first:
                log_anomaly(self.folder.anomalies_file, facts, by_rank)
        words = f"step {step}: {anomaly.describe()}"
        if policy == "stop":
            raise TrainingError(f"{words}. {self._way_on()}")
        if self._health.consecutive >= _MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{words}, as in {self._health.consecutive} steps in a row: the weights "
                f"must be at fault. {self._way_on()}"
            )
        say(f"{words}; {action}. Its rows are in {self.folder.anomalies_file}")
        if policy == "rollback":
            raise _RollbackRequest(batch)

    def _way_on(self) -> str:
        """What to do about weights that have gone wrong."""
        # One that is being written may be the newest to go on from.
        with contextlib.suppress(TrainingError):
            self.writer.wait()
        self._report_saved()
        newest = self.folder.newest_checkpoint()
        return "Go on in another --output_dir with a lower --learning_rate" + (
            f" and --resume {newest}" if newest is not None else ""
        )

    def _roll_back(self, batch: int) -> dict[str, Any]:
        """Go back to the newest checkpoint, to continue without a batch.

        Returns:
            The record of the checkpoint, with the batch among those left out.

        Raises:
            TrainingError: there is no checkpoint yet, or too many batches are left out.
        """
        self.writer.wait()
        self._report_saved()
        excluded = [*self._excluded, batch]
        newest = newest_whole(self.ranks, self.folder.all_checkpoints())
        if newest is None:
            raise TrainingError(
                "there is no checkpoint yet to go back to: start in another --output_dir "
                "with a lower --learning_rate, or with --on_anomaly skip"
            )
        if len(excluded) > _MOST_EXCLUDED_BATCHES:
            raise TrainingError(
                f"{len(excluded)} batches had to be left out: the data or the learning "
                f"rate is at fault. {self._way_on()}"
            )
        record = load_checkpoint(self.engine, self.ranks, self.run, newest)
        say(f"back at {newest}, {record['step']:,} steps done, without batch {batch}")
        self.monitor.rewind(record["step"])
        attempt = self._begin_attempt()
        if self.ledger is not None:
            self.ledger.begin_attempt(attempt)
        health = {
            **record["health"],
            "skipped_steps": self._health.skipped_steps,
        }
        return {**record, "excluded_batches": excluded, "health": health}

    def _begin_attempt(self) -> int:
        """Count one more start of the run: steps will be done again."""
        attempt = None
        with self.ranks.agreeing():
            if self.ranks.is_first:
                config = self.folder.read_config()
                config["attempts"] += 1
                write_json(self.folder.config_file, config)
                attempt = config["attempts"]
        return self.ranks.from_first(attempt)

    def _validation_due(self, done: int) -> bool:
        due = done == self.schedule.steps or done % self.training.eval_interval == 0
        return bool(self.run.validation) and done > 0 and due

    def _validate(self, done: int) -> None:
        evaluation = {"step": done, **self._validation.run(done)}
        self.monitor.validation(evaluation)
        self._final.update({**evaluation, "validated_step": done})

    def _enter(self, phase: str, step: int) -> None:
        """Tell whoever watches what a step does next."""
        self.watchdog.progress(phase, step)
        self.stragglers.enter(phase)


class _RollbackRequest(Exception):
    """The run must go back to its newest checkpoint, and leave out a batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

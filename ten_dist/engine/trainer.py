"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import deepspeed

from ten_dist.checkpoint import RunState
from ten_dist.console import say
from ten_dist.data import TokenBatch, batch_of_step, training_batches
from ten_dist.engine.benchmarks import run_benchmarks
from ten_dist.engine.checkpointing.load import load_checkpoint, newest_whole
from ten_dist.engine.checkpointing.probe import run_probe
from ten_dist.engine.checkpointing.save import CheckpointWriter
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Anomaly, Health
from ten_dist.engine.learned import Learned
from ten_dist.engine.loss_scale import LossScale
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.samples import Samples
from ten_dist.engine.step import Stepper, StepResult
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.engine.validation import ValidationStopped, readable, validate
from ten_dist.errors import RunStoppedError, TrainingError
from ten_dist.run_folder import RunFolder

_MOST_SKIPPED_IN_A_ROW = 10
_MOST_EXCLUDED_BATCHES = 100


@dataclasses.dataclass
class Trainer:
    """Runs the steps of a schedule on a DeepSpeed engine.

    Steps are counted from 1 in everything a user sees: step n is the n-th update, and a
    checkpoint of step n has done n of them.
    """

    engine: deepspeed.DeepSpeedEngine
    ranks: Ranks
    run: ResolvedRun
    folder: RunFolder
    writer: CheckpointWriter
    stop: StopSignals
    reporter: Reporter
    start: dataclasses.InitVar[RunState]
    """State of the checkpoint to continue from, or that of a new run."""

    def __post_init__(self, start: RunState) -> None:
        self._training, self._schedule = self.run.training, self.run.schedule
        self._learned = Learned(self.engine, self.ranks, self.run, self.reporter)
        self._samples = Samples(self.engine, self.run, self.reporter)
        self._restore(start)

    def _restore(self, state: RunState) -> None:
        """Have the state of a checkpoint, or that of the start."""
        self._metrics = dict(state.metrics)
        self._excluded = list(state.excluded_batches)
        self._health = Health(self._training.spike_threshold, state.health)
        scaled = self._training.precision == "fp16"
        self._loss_scale = LossScale(state.loss_scale) if scaled else None
        self._done = state.step

    def _state(self) -> RunState:
        """What a checkpoint has to keep."""
        read = batch_of_step(self._done, self._excluded)
        return RunState(
            step=self._done,
            consumed_rows=read * self._schedule.global_batch_size,
            metrics=dict(self._metrics),
            excluded_batches=list(self._excluded),
            health=self._health.state(),
            loss_scale=None if self._loss_scale is None else self._loss_scale.state(),
        )

    def fit(self) -> dict[str, Any]:
        """Train to the end of the schedule.

        Returns:
            Metrics of the last step and of the last validation and benchmarks.

        Raises:
            TrainingError: loss or gradient was wrong and `--on_anomaly` or the number of
                such steps ends the run, or a file cannot be read or written.
            RunStoppedError: a signal asked for it; all that was done is saved.
        """
        while True:
            try:
                return self._train()
            except _RollbackRequest as rollback:
                self._roll_back(rollback.batch)

    def _train(self) -> dict[str, Any]:
        steps = self._schedule.steps
        # The checkpoint may be another run's: this one then gets its own.
        own = self.ranks.from_first(bool(self.folder.all_checkpoints()))
        saved = self._done if own else 0
        batches = self._batches()
        stepper = Stepper(
            self.engine,
            self.ranks,
            self.run,
            self.stop,
            self._health,
            self._loss_scale,
            self.reporter,
            self.writer.before_update,
        )
        stopping = self.stop.requested_of_any(self.ranks)
        try:
            # Stopped in the middle of a validation, the run makes up for it first.
            self._evaluate_if_due()
            while self._done < steps and not stopping:
                self.reporter.begin_step(self._done + 1)
                result = stepper(self._done + 1, batches, self._excluded)
                self._done += 1
                self.reporter.step(result.metrics)
                self.writer.report_saved()
                self._metrics.update(result.metrics)
                stopping = result.stop_requested
                if result.overflowed and self._loss_scale is not None:
                    self._say_overflow(self._loss_scale)
                if result.anomaly is not None:
                    self._respond(result.anomaly, result)
                self._evaluate_if_due()
                self._learned.look_if_due(self._done)
                self._samples.write_if_due(self._done)
                interval = self._training.checkpoint_interval
                if self._done == steps or self._done % interval == 0:
                    self._save()
                    saved = self._done
        except ValidationStopped:
            stopping = True
        if saved < self._done:
            self._save()
        self.writer.wait()
        if stopping:
            raise RunStoppedError(
                f"stopped after step {self._done:,} of {steps:,}, saved: the same "
                "command continues"
            )
        return self._metrics

    def _batches(self) -> Iterator[TokenBatch]:
        schedule, training, data = self._schedule, self._training, self.run.data
        assert data is not None
        return readable(
            training_batches(
                data,
                schedule.batch_shape(self.ranks.rank),
                seed=training.seed,
                first_step=self._done,
                last_step=schedule.steps,
                num_workers=training.num_workers,
                excluded=self._excluded,
            )
        )

    def _save(self) -> None:
        step = self._done
        self.reporter.progress("checkpoint", step)
        probe = run_probe(self.engine, self.ranks, self.run)
        try:
            probe.check()
        except TrainingError as error:
            raise TrainingError(
                f"after step {step}, not saved: {error}. {self._way_on()}"
            ) from None
        self.reporter.record(
            {
                "step": step,
                "energy_bound_ratio": probe.energy_bound_ratio,
                "eigenvalue_distance": probe.eigenvalue_distance,
            }
        )
        tick = functools.partial(self.reporter.progress, "checkpoint", step)
        self.writer.save(self._state(), probe.loss, tick)

    def _say_overflow(self, scale: LossScale) -> None:
        """Say that an update was left out: of many overflows the 1st, 2nd, 4th, 8th..."""
        number = scale.overflowed_steps
        if number & (number - 1) == 0:
            say(
                f"step {self._done}: the gradient overflowed in float16 and was not applied, "
                f"the loss scale is now {scale.value:g}; {number} such steps so far"
            )

    def _respond(self, anomaly: Anomaly, result: StepResult) -> None:
        """Do what `--on_anomaly` says about the last step.

        Raises:
            TrainingError: the run must end.
            _RollbackRequest: it must go back.
        """
        step, policy = self._done, self._training.on_anomaly
        batch = batch_of_step(step - 1, self._excluded)
        action = "kept, clipped" if policy == "skip" and anomaly.applied else policy
        facts = {
            "step": step,
            "batch": batch,
            "kind": anomaly.kind,
            "value": anomaly.value if math.isfinite(anomaly.value) else None,
            "z_score": anomaly.z_score,
            "action": action,
        }
        names = ("sources", "epochs", "rows")
        rows = [{n: getattr(taken, n).tolist() for n in names} for taken in result.rows]
        by_rank = self.ranks.gather(rows)
        with self.ranks.agreeing():
            if self.ranks.is_first:
                with self.folder.anomalies_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**facts, "rows_by_rank": by_rank}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
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
        newest = self.folder.newest_checkpoint()
        resume = "" if newest is None else f" and --resume {newest}"
        return f"Go on in another --output_dir with a lower --learning_rate{resume}"

    def _roll_back(self, batch: int) -> None:
        """Go back to the newest checkpoint, to continue without a batch.

        Raises:
            TrainingError: there is no checkpoint yet, or too many batches are left out.
        """
        self.writer.wait()
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
        skipped = self._health.skipped_steps
        state = load_checkpoint(self.engine, self.ranks, self.run, newest)
        say(f"back at {newest}, {state.step:,} steps done, without batch {batch}")
        # One more start of the run: steps will be done again.
        with self.ranks.agreeing():
            attempt = self.folder.begin_attempt() if self.ranks.is_first else None
        self.reporter.rewind(state.step, self.ranks.from_first(attempt))
        health = dataclasses.replace(state.health, skipped_steps=skipped)
        self._restore(
            dataclasses.replace(state, excluded_batches=excluded, health=health)
        )

    def _evaluate_if_due(self) -> None:
        known = (self.engine, self.ranks, self.run, self.stop, self.reporter)
        every = self._training.eval_interval
        if self.run.validation and self._is_due("validated_step", every):
            self._record("validated_step", validate(*known, self._done))
        every = self._training.eval_tasks_interval or every
        if self.run.tasks and self._is_due("benchmarked_step", every):
            self._record("benchmarked_step", run_benchmarks(*known, self._done))

    def _is_due(self, last: str, interval: int) -> bool:
        """Whether something is due that is done at an interval, and at the end.

        Args:
            last: name of the metric that tells when it was done last.
            interval: in steps.
        """
        done = self._done
        if self._metrics.get(last) == done:
            return False
        if done == 0:
            # Weights of another run are worth something before the first step.
            return self._training.init_from is not None
        return done == self._schedule.steps or done % interval == 0

    def _record(self, last: str, figures: dict[str, float]) -> None:
        evaluation = {"step": self._done, **figures}
        self.reporter.record(evaluation)
        self._metrics.update({**evaluation, last: self._done})


@dataclasses.dataclass
class _RollbackRequest(Exception):
    """The run must go back to its newest checkpoint, and leave out a batch."""

    batch: int

"""Held-out loss in the course of a training."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
from torch import Tensor

from ten_dist.data import Manifest, TokenBatch, evaluation_batches
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.errors import DataError, TrainingError
from ten_dist.evaluation import Evaluation, combine, evaluate


class ValidationStopped(Exception):
    """A signal came in the middle of a validation."""


class Validation:
    """Evaluates the model of a run on its held-out sets. Every rank has one."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        stop: StopSignals,
        reporter: Reporter,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._run = run
        self._stop = stop
        self._reporter = reporter

    def run(self, step: int) -> dict[str, float]:
        """Held-out figures; every rank must call this.

        Of a mixture, those of each source's held-out set, and of all in its proportions.

        Args:
            step: optimizer steps done.

        Raises:
            ValidationStopped: on all ranks, where one was asked to stop.
            TrainingError: the data cannot be read.
        """
        self._engine.eval()
        try:
            results = {
                name: self._evaluate(held_out, step)
                for name, held_out in self._run.validation.items()
            }
        finally:
            self._engine.train()
        if "" in results:
            return results[""].metrics()
        shares = dict(zip(self._run.data.names, self._run.data.shares))
        weights = [shares[name] for name in results]
        return {
            **combine(list(results.values()), weights).metrics(),
            **{f"val_loss/{name}": result.loss for name, result in results.items()},
        }

    def _evaluate(self, held_out: Manifest, step: int) -> Evaluation:
        batches = evaluation_batches(
            held_out,
            self._run.schedule.batch_shape(self._ranks.rank),
            max_rows=self._run.training.eval_rows or None,
        )
        return evaluate(
            self._losses_of,
            self._until_stopped(readable(batches), step),
            held_out,
            self._engine.device,
            self._ranks.sum,
        )

    def _losses_of(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self._engine(inputs, targets=targets)

    def _until_stopped(
        self, batches: Iterator[TokenBatch], step: int
    ) -> Iterator[TokenBatch]:
        """`batches`, of which every rank has as many; each of them is progress."""
        self._reporter.progress("validation", step)
        for batch in batches:
            if self._stop.requested_of_any(self._ranks):
                raise ValidationStopped
            yield batch
            self._reporter.progress("validation", step)


def readable(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
    """`batches`, with damage reported as what it is by now.

    The data was whole when the run started, so this is no wrong option any more.
    """
    try:
        yield from batches
    except DataError as error:
        raise TrainingError(f"{error}; then start again to continue") from error

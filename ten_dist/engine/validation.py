"""Held-out loss in the course of a training."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed

from ten_dist.data import Mixture, TokenBatch, evaluation_batches
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.errors import DataError, TrainingError
from ten_dist.evaluation import combine, evaluate


class ValidationStopped(Exception):
    """A signal came in the middle of a validation."""


def validate(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    run: ResolvedRun,
    stop: StopSignals,
    reporter: Reporter,
    step: int,
) -> dict[str, float]:
    """Evaluate the model after a step on the held-out sets; every rank must call this.

    Returns:
        Figures by the names of metrics.jsonl: of a mixture those of each source's
        held-out set, and of all in its proportions.

    Raises:
        ValidationStopped: on all ranks, where one was asked to stop.
        TrainingError: the data cannot be read.
    """

    def until_stopped(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        # Every rank has as many.
        reporter.progress("validation", step)
        for batch in batches:
            if stop.requested_of_any(ranks):
                raise ValidationStopped
            yield batch
            reporter.progress("validation", step)

    engine.eval()
    try:
        results = {}
        for name, held_out in run.validation.items():
            batches = evaluation_batches(
                held_out,
                run.schedule.batch_shape(ranks.rank),
                max_rows=run.training.eval_rows or None,
            )
            batches = until_stopped(readable(batches))
            results[name] = evaluate(
                engine, batches, held_out, engine.device, ranks.sum
            )
    finally:
        engine.train()
    if "" in results:
        return results[""].metrics()
    assert isinstance(run.data, Mixture)
    shares = dict(zip(run.data.names, run.data.shares))
    mixed = combine(list(results.values()), [shares[name] for name in results])
    by_source = {f"val_loss/{name}": result.loss for name, result in results.items()}
    return {**mixed.metrics(), **by_source}


def readable(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
    """`batches`, with damage reported as what it is by now.

    The data was whole when the run started, so this is no wrong option any more.
    """
    try:
        yield from batches
    except DataError as error:
        raise TrainingError(f"{error}; then start again to continue") from error

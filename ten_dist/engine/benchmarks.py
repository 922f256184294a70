"""Benchmarks in the course of a training."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor

from ten_dist.config.training import TrainingConfig
from ten_dist.data.tokenizer import set_tokenizer
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.evaluating import evaluating
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.engine.validation import ValidationStopped
from ten_dist.errors import ConfigurationError
from ten_dist.harness.scoring import Scorer
from ten_dist.harness.tasks import Tasks


def load_tasks(training: TrainingConfig) -> Tasks | None:
    """The tasks of `--eval_tasks` with their data, where there are any.

    Raises:
        ConfigurationError: one cannot be loaded, or is not for use while training.
    """
    if not training.eval_tasks:
        return None
    tasks = Tasks.load(
        training.eval_tasks,
        training.eval_tasks_path,
        ("--eval_tasks", "--eval_tasks_path"),
    )
    writing = tasks.generating()
    if writing:
        raise ConfigurationError(
            f"--eval_tasks {','.join(writing)} has the model write text, which is not done "
            "while training: leave it to `ten-dist evaluate --tasks`"
        )
    return tasks


def run_benchmarks(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    run: ResolvedRun,
    stop: StopSignals,
    reporter: Reporter,
    step: int,
) -> dict[str, float]:
    """Ask the model after a step the questions of the run's tasks; every rank must call
    this.

    Returns:
        Figures by the names of metrics.jsonl, `task/NAME/FIGURE`.

    Raises:
        ValidationStopped: on all ranks, where one was asked to stop.
    """
    from ten_dist.harness.language_model import HarnessModel

    def asked(ids: Tensor, **options: Any) -> Any:
        # Every rank as often.
        if stop.requested_of_any(ranks):
            raise ValidationStopped
        reporter.progress("benchmarks", step)
        return engine(ids, **options)

    assert run.tasks is not None
    scorer = Scorer(
        asked,
        run.model_config.vocab_size,
        engine.device,
        # What training has room for.
        tokens_at_once=run.schedule.micro_batch_size * run.schedule.seq_len,
        rank=ranks.rank,
        world_size=ranks.world_size,
        gather=ranks.gather,
    )
    model = HarnessModel(scorer, set_tokenizer(run.manifests()[0]))
    reporter.progress("benchmarks", step)
    with evaluating(engine, run):
        found = run.tasks.run(
            model,
            limit=run.training.eval_tasks_limit,
            bootstrap_iterations=0,
            quiet=True,
        )
    return {
        f"task/{task}/{name}": value
        for task, figures in found.items()
        for name, value in figures.items()
        if "_stderr" not in name
    }

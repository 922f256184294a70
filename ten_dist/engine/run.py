"""One training run, from its options to its last checkpoint."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.data import Mixture, read_tokenizer, verify_shards
from ten_dist.engine.assembly import build_engine, build_model, seed_everything
from ten_dist.engine.checkpoints import check_loadable, load_checkpoint
from ten_dist.engine.deepspeed_config import load_deepspeed_file
from ten_dist.engine.distributed import Ranks, describe_ranks
from ten_dist.engine.dry_run import dry_run
from ten_dist.engine.host_memory import keep_freed_memory
from ten_dist.engine.plan import make_plan
from ten_dist.engine.resolution import ResolvedRun, resolve
from ten_dist.engine.resume import check_same_run
from ten_dist.engine.trainer import Trainer
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import write_bytes, write_json
from ten_dist.monitor.console import say
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import RunMonitor, SilentMonitor
from ten_dist.monitor.watchdog import NoWatchdog, Watchdog
from ten_dist.run_folder import RunFolder
from ten_dist.training_config import TrainingConfig

# A rank that waits must not give up before the watchdog has said where the others are.
_SECONDS_FOR_REPORTS = 120


@dataclasses.dataclass(frozen=True)
class Start:
    """Where one start of a run begins."""

    attempt: int
    """Which start of the run this is, from 1."""
    checkpoint: Path | None
    """What to continue from, or None for initial weights."""
    completed: dict[str, Any] | None
    """Final metrics, where there is nothing left to do."""


def train(training: TrainingConfig, model_options: dict[str, Any]) -> None:
    """Run `ten-dist train` on this rank.

    Args:
        training: options of the run.
        model_options: model fields that replace those of the preset.

    Raises:
        ConfigurationError: on every rank where any rank finds something wrong, before
            anything is written.
        TrainingError: training cannot go on.
    """
    rank, world_size = describe_ranks()
    # What every rank reads alike from the command line is checked before the ranks
    # connect: a mistyped option then costs a second.
    deepspeed_file = load_deepspeed_file(training.deepspeed_config)
    TemporalEigenstateConfig.preset(training.config, **model_options)
    make_plan(dataclasses.replace(training, epochs=None), world_size, None)

    watchdog: Watchdog | NoWatchdog = NoWatchdog()
    if not training.dry_run:
        watchdog = Watchdog(
            Path(training.output_dir),
            rank,
            world_size,
            training.hang_timeout,
            training.startup_timeout,
        )
    try:
        _train(training, model_options, deepspeed_file, watchdog)
    finally:
        watchdog.close()


def _train(
    training: TrainingConfig,
    model_options: dict[str, Any],
    deepspeed_file: dict[str, Any],
    watchdog: Watchdog | NoWatchdog,
) -> None:
    limit = max(training.hang_timeout, training.startup_timeout)
    ranks = Ranks(limit + _SECONDS_FOR_REPORTS)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with ranks.agreeing():
        run = resolve(training, model_options, deepspeed_file, ranks.world_size)
    _agree_on_data(ranks, run)
    start = None if training.dry_run else _find_start(ranks, run)
    if start is None or start.completed is None:
        for line in run.describe():
            say(line)
        _verify_data(ranks, run, watchdog)
    if start is None:
        dry_run(ranks, run, deepspeed_file)
    elif start.completed is None:
        _run(ranks, run, start, watchdog)
    else:
        say(
            f"{training.output_dir} is complete: {start.completed['step']:,} steps, "
            f"loss {start.completed['loss']:.4f}. Nothing to do."
        )
    ranks.close()


def _agree_on_data(ranks: Ranks, run: ResolvedRun) -> None:
    """Refuse a run whose ranks would not read the same tokens.

    Raises:
        DataError: a node has other data at that path, or it was replaced on its server
            while the ranks looked.
    """
    sets = [manifest.fingerprint for manifest in run.manifests()]
    of_first = ranks.from_first(sets)
    with ranks.agreeing():
        if sets != of_first:
            raise DataError(
                "--data or --val_data is not the same token set as on rank 0: have the "
                "same data on every node, and do not replace it while a run reads it"
            )


def _find_start(ranks: Ranks, run: ResolvedRun) -> Start:
    """Where to begin, found by rank 0 for all; nothing is written.

    Raises:
        ConfigurationError: the output folder or a checkpoint cannot be used.
    """
    folder, resume = RunFolder(run.training.output_dir), run.training.resume
    start = None
    with ranks.agreeing():
        if ranks.is_first:
            folder.check_writable()
            attempt = check_same_run(folder, run.identity(), resume)
            checkpoint = folder.newest_checkpoint(
                lambda damage: say(f"passing over a checkpoint: {damage}")
            )
            if checkpoint is None and resume not in ("auto", "never"):
                checkpoint = Path(resume)
            if checkpoint is not None:
                check_loadable(checkpoint, run)
            start = Start(attempt, checkpoint, folder.completed())
    return ranks.from_first(start)


def _verify_data(
    ranks: Ranks, run: ResolvedRun, watchdog: Watchdog | NoWatchdog
) -> None:
    full = run.training.data_verification == "full"
    with ranks.agreeing():
        for manifest in run.manifests():
            verify_shards(
                manifest,
                ranks.rank,
                ranks.world_size,
                full=full,
                tick=lambda: watchdog.progress("start-up"),
            )


def _run(
    ranks: Ranks, run: ResolvedRun, start: Start, watchdog: Watchdog | NoWatchdog
) -> None:
    training, plan = run.training, run.plan
    folder = RunFolder(training.output_dir)
    engine = build_engine(
        build_model(run.model_config, training.seed, run.deepspeed_config),
        training,
        run.deepspeed_config,
        ranks,
    )
    ranks.be_patient()
    watchdog.progress("start-up")
    # Each rank draws its own dropout masks.
    seed_everything(training.seed + 1 + ranks.rank)
    steps_done, metrics = 0, {}
    if start.checkpoint is not None:
        record = load_checkpoint(engine, ranks, start.checkpoint)
        steps_done, metrics = record["step"], record["metrics"]
        say(f"continuing from {start.checkpoint}, {steps_done:,} steps done")
    else:
        say("starting from initial weights: no checkpoint to continue from")
    with ranks.agreeing():
        if ranks.is_first:
            folder.create()
            write_json(folder.config_file, {**run.to_dict(), "attempts": start.attempt})
            write_bytes(folder.tokenizer_file, read_tokenizer(run.manifests()[0]))
    with ranks.agreeing():
        if not folder.exists():
            raise ConfigurationError(
                f"--output_dir {folder.path} is not the same folder on every node: "
                "checkpoints are written by all ranks, put it on a shared file system"
            )
        watchdog.open_report()
        monitor, ledger = SilentMonitor(), None
        if ranks.is_first:
            monitor = RunMonitor(folder, steps_done, plan.steps)
        if training.ledger:
            sources = run.data.names if isinstance(run.data, Mixture) else ()
            ledger = Ledger(folder.ledger, ranks.rank, start.attempt, sources)
    started = time.perf_counter()
    try:
        trainer = Trainer(engine, ranks, run, folder, monitor, ledger, watchdog)
        final = trainer.fit(steps_done, metrics)
    finally:
        monitor.close()
        if ledger is not None:
            ledger.close()
    watchdog.progress("end")
    with ranks.agreeing():
        if ranks.is_first:
            final["train_seconds"] = time.perf_counter() - started
            write_json(folder.completed_file, final)
    say(f"done: {folder.path}, {final['step']:,} steps, loss {final['loss']:.4f}")

"""One training run, from its options to its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from ten_dist.checkpoint import CheckpointReader, RunState
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.step_range import StepRange
from ten_dist.config.training import TrainingConfig
from ten_dist.console import say, warn
from ten_dist.data import Mixture, is_url, read_tokenizer, verify_shards
from ten_dist.data.chat_template import read_chat_template
from ten_dist.data.verify import miscounted
from ten_dist.deepspeed_config import (
    check_nvme_path,
    check_optimizer,
    load_deepspeed_file,
)
from ten_dist.engine.assembly import build_engine
from ten_dist.engine.benchmarks import load_tasks
from ten_dist.engine.checkpointing.branching import (
    Parent,
    describe_branch,
    describe_late_extension,
    find_parent,
)
from ten_dist.engine.checkpointing.load import (
    check_loadable,
    check_whole,
    load_checkpoint,
    newest_whole,
    recorded_run,
)
from ten_dist.engine.checkpointing.save import CheckpointWriter, lacking_space
from ten_dist.engine.deepspeed_internals import set_timeout_of_groups
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.dry_run import dry_run
from ten_dist.engine.host_memory import keep_freed_memory
from ten_dist.engine.initial_weights import (
    InitialWeights,
    find_initial_weights,
    load_initial_weights,
)
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun, resolve
from ten_dist.engine.samples import load_sample_prompts
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.engine.stragglers import Stragglers
from ten_dist.engine.swap_folder import check_swap_path, swap_folder
from ten_dist.engine.trainer import Trainer
from ten_dist.errors import ConfigurationError, DataError, RunStoppedError
from ten_dist.files import write_bytes, write_json
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.profiling.communication_share import CommunicationShare
from ten_dist.monitor.profiling.memory_snapshot import snapshot_when_memory_runs_out
from ten_dist.monitor.profiling.step_profiler import StepProfiler
from ten_dist.monitor.run_monitor import RunMonitor
from ten_dist.monitor.trackers.tracker import check_installed
from ten_dist.monitor.trackers.tracker_process import TrackerProcess
from ten_dist.monitor.watchdog import Watchdog
from ten_dist.own_rank import take_part
from ten_dist.run_folder import RunFolder
from ten_dist.run_record import RunRecord
from ten_dist.schedule import make_schedule

_SECONDS_FOR_LAST_CHECKPOINT = 60
# A rank that waits must not give up before the watchdog has said where the others are.
_SECONDS_FOR_REPORTS = 120


@dataclasses.dataclass(frozen=True)
class Start:
    """Where one start of a run begins."""

    folder: RunFolder
    before: RunRecord | None
    """What earlier starts of the run have recorded, if there were any."""
    checkpoint: Path | None
    """What to continue from, or None for initial weights."""
    step: int
    """Steps that it has done."""
    completed: dict[str, Any] | None
    """Final metrics, where there is nothing left to do."""
    initial: InitialWeights | None = None
    """What `--init_from` names, where a run without a checkpoint begins with it."""
    parent: Parent | None = None
    """The run of the checkpoint that `--resume PATH` has a new run begin with."""

    def past(self, training: TrainingConfig) -> RunRecord | None:
        """What the run was until now: here, or where `--extend` takes it from."""
        if self.before is None and self.parent is not None and training.extend:
            return self.parent.record
        return self.before

    def describe(self, run: ResolvedRun) -> str:
        """What becomes of the steps that are done; empty where they simply go on."""
        past, parent = self.past(run.training), self.parent
        text = ""
        if parent is not None:
            text = describe_branch(run, parent, self.step)
        elif past is not None and past.schedule.steps != run.schedule.steps:
            common = past.common_steps(run.schedule)
            text = run.schedule.describe_extension(past.schedule, self.step, common)
        if text and past is not None:
            folder = self.folder if parent is None else parent.folder
            text += describe_late_extension(run, folder, past, self.step)
        return text

    @property
    def attempt(self) -> int:
        """Which start of the run this is, from 1."""
        return 1 if self.before is None else self.before.attempts + 1


def train(training: TrainingConfig, model_options: dict[str, Any]) -> None:
    """Run `ten-dist train` on this rank.

    Args:
        training: options of the run.
        model_options: model fields that replace those of the preset.

    Raises:
        ConfigurationError: on every rank where any rank finds something wrong, before
            anything is written.
        TrainingError: training cannot go on.
        RunStoppedError: a signal stopped it; the same command continues.
    """
    own = take_part()
    # What every rank reads alike from the command line is checked before the ranks
    # connect: a mistyped option then costs a second.
    deepspeed_file = load_deepspeed_file(training.deepspeed_config)
    check_nvme_path(deepspeed_file, training)
    check_optimizer(deepspeed_file, training)
    TemporalEigenstateConfig.preset(training.config, **model_options)
    make_schedule(dataclasses.replace(training, epochs=None), own.world_size, None)

    # A dry run has no folder to report a hang in.
    limits = (training.hang_timeout, training.startup_timeout)
    watchdog = Watchdog(
        Path(training.output_dir or "."),
        own.rank,
        own.world_size,
        *((0.0, 0.0) if training.dry_run else limits),
    )
    with contextlib.closing(watchdog):
        ranks = Ranks(max(limits) + _SECONDS_FOR_REPORTS)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        with ranks.agreeing():
            run = resolve(training, model_options, deepspeed_file, ranks.world_size)
        _train(ranks, run, watchdog)
        ranks.close()


def _train(ranks: Ranks, run: ResolvedRun, watchdog: Watchdog) -> None:
    training = run.training
    with ranks.agreeing():
        # Only rank 0 has one.
        if ranks.is_first and training.tracker is not None:
            check_installed(training.tracker)
    _agree_on_data(ranks, run)
    start = None
    if training.data is not None and training.output_dir is not None:
        # Of a dry run as well: whether there is one is part of what it finds out.
        start = _find_start(ranks, run, RunFolder(training.output_dir))
        run = run.continuing(start.past(training))
    if not training.dry_run and start is not None and start.completed is not None:
        say(
            f"{training.output_dir} is complete: {start.completed['step']:,} steps, "
            f"loss {start.completed['loss']:.4f}. Nothing to do."
        )
        return
    with ranks.agreeing():
        check_swap_path(run.deepspeed_config, run.parameters, ranks)
        run = dataclasses.replace(run, tasks=load_tasks(training))
        prompts: tuple[tuple[int, ...], ...] = ()
        if ranks.is_first and (manifests := run.manifests()):
            prompts = load_sample_prompts(training, manifests[0])
    run = dataclasses.replace(run, sample_prompts=ranks.from_first(prompts))
    for line in run.describe():
        say(line)
    if start is not None and (becomes := start.describe(run)):
        say(becomes)
    if training.precision == "fp16" and ranks.device.type == "cpu":
        say(
            "--precision fp16 is for GPUs: processors rarely multiply in float16, "
            "expect this to be many times slower than fp32"
        )
    _verify_data(ranks, run, watchdog)
    if training.dry_run or start is None:
        dry_run(ranks, run)
        return
    with (
        StopSignals(training.grace_seconds, ranks.is_first).watched() as stop,
        swap_folder(run.deepspeed_config, ranks) as deepspeed_config,
    ):
        _run(ranks, run, deepspeed_config, start, stop, watchdog)


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


def _find_start(ranks: Ranks, run: ResolvedRun, folder: RunFolder) -> Start:
    """Where to begin, found by rank 0 for all; nothing is written.

    Raises:
        ConfigurationError: the output folder or a checkpoint cannot be used.
    """
    resume = run.training.resume
    before, completed, parent = None, None, None
    checkpoints: list[Path] = []
    with ranks.agreeing():
        if ranks.is_first:
            folder.check_writable()
            before = recorded_run(folder, run)
            if before is None or before.schedule.steps == run.schedule.steps:
                completed = folder.completed()
            if completed is None:
                checkpoints = folder.all_checkpoints()
                reason = lacking_space(folder, run)
                if reason is not None:
                    raise ConfigurationError(reason)
    completed = ranks.from_first(completed)
    checkpoint = newest_whole(ranks, checkpoints)
    if checkpoint is None and completed is None and resume not in ("auto", "never"):
        checkpoint = Path(resume)
        check_whole(ranks, checkpoint)
        with ranks.agreeing():
            if ranks.is_first and before is None:
                parent = find_parent(run)
    step, initial = 0, None
    with ranks.agreeing():
        if ranks.is_first and checkpoint is not None:
            step = check_loadable(checkpoint, run)
        elif ranks.is_first and completed is None:
            initial = _find_initial_weights(run, before)
    start = ranks.from_first(
        Start(folder, before, checkpoint, step, completed, initial, parent)
    )
    if start.initial is not None and not start.initial.exported:
        check_whole(ranks, start.initial.path)
    return start


def _find_initial_weights(
    run: ResolvedRun, before: RunRecord | None
) -> InitialWeights | None:
    """What a run without a checkpoint begins with; None for initial weights."""
    if run.training.init_from is not None:
        return find_initial_weights(run)
    if before is not None and before.origin is not None:
        raise ConfigurationError(
            f"the run has no checkpoint yet, and began with the weights of "
            f"{before.origin.path}: give that again with --init_from"
        )
    return None


def _verify_data(ranks: Ranks, run: ResolvedRun, watchdog: Watchdog) -> None:
    full = run.training.data_verification == "full"
    for manifest in run.manifests():
        with ranks.agreeing():
            found = verify_shards(
                manifest,
                ranks.rank,
                ranks.world_size,
                full=full,
                tick=lambda: watchdog.progress("start-up"),
            )
        if not full or is_url(manifest.directory):
            continue
        separators = sum(ranks.gather(found))
        with ranks.agreeing():
            if separators != manifest.documents:
                raise miscounted(manifest, separators)


def _run(
    ranks: Ranks,
    run: ResolvedRun,
    deepspeed_config: dict[str, Any],
    start: Start,
    stop: StopSignals,
    watchdog: Watchdog,
) -> None:
    folder = start.folder
    engine = build_engine(run, deepspeed_config, ranks)
    set_timeout_of_groups(ranks.timeout)
    watchdog.progress("start-up")
    state = RunState()
    if start.checkpoint is not None:
        state = load_checkpoint(engine, ranks, run, start.checkpoint)
        say(f"continuing from {start.checkpoint}, {state.step:,} steps done")
    elif start.initial is not None:
        load_initial_weights(engine, ranks, start.initial, run.training.seed)
        say(f"starting from the weights of {start.initial.path}")
        if start.initial.kept_rows is not None:
            say(start.initial.describe_rows(run.model_config.vocab_size))
    else:
        say("starting from initial weights: no checkpoint to continue from")
    _make_folder(ranks, run, start)
    with ranks.agreeing():
        watchdog.open_report()
        reporter = _reporter(ranks, run, start, state, watchdog)
    started = time.perf_counter()
    writer = CheckpointWriter(engine, ranks, run, folder, reporter.record)
    try:
        trainer = Trainer(engine, ranks, run, folder, writer, stop, reporter, state)
        history = run.training.profile_steps is not None
        with snapshot_when_memory_runs_out(folder.profile, ranks.rank, history=history):
            final = trainer.fit()
    except RunStoppedError as stopped:
        say(str(stopped))
        stopped.reported = True
        ranks.close()
        raise
    finally:
        # Where training failed, the checkpoint that was begun last may still complete.
        writer.abandon(_SECONDS_FOR_LAST_CHECKPOINT)
        reporter.close()
    watchdog.progress("end")
    with ranks.agreeing():
        if ranks.is_first:
            with CheckpointReader(folder.usable_checkpoint()) as reader:
                reader.export(folder.weights_file)
            final["train_seconds"] = time.perf_counter() - started
            assert reporter.monitor is not None
            dollars = reporter.monitor.total_dollars(final["step"])
            if dollars is not None:
                final["dollars"] = dollars
            write_json(folder.completed_file, final)
    cost = f", {final['dollars']:.2f} dollars" if "dollars" in final else ""
    say(f"done: {folder.path}, {final['step']:,} steps, loss {final['loss']:.4f}{cost}")


def _make_folder(ranks: Ranks, run: ResolvedRun, start: Start) -> None:
    """Make the run's folder, with what is known before the first step.

    Raises:
        ConfigurationError: the file system refuses, or is not one for all nodes.
    """
    folder = start.folder
    with ranks.agreeing():
        if ranks.is_first:
            folder.create()
            folder.delete_partial_checkpoints()
            # Of a run that is extended. A kill before the next line leaves one that is
            # made complete again.
            folder.completed_file.unlink(missing_ok=True)
            origin = None if start.initial is None else start.initial.origin
            past = start.past(run.training)
            folder.write(run.record(past, start.attempt, start.step, origin))
            write_bytes(folder.tokenizer_file, read_tokenizer(run.manifests()[0]))
            templates = [*filter(None, map(read_chat_template, run.manifests()))]
            if templates:
                write_bytes(folder.chat_template_file, templates[0])
            if len(set(templates)) > 1:
                warn("the sets have several chat templates: the run keeps the first")
    with ranks.agreeing():
        if not folder.exists():
            raise ConfigurationError(
                f"--output_dir {folder.path} is not the same folder on every node: "
                "checkpoints are written by all ranks, put it on a shared file system"
            )


def _reporter(
    ranks: Ranks, run: ResolvedRun, start: Start, state: RunState, watchdog: Watchdog
) -> Reporter:
    training, folder, monitor, ledger = run.training, start.folder, None, None
    if ranks.is_first:
        steps, dollars = run.schedule.steps, training.dollars_per_hour
        tracker = None
        if training.tracker is not None:
            project = training.tracker_project or "ten_dist"
            tracker = TrackerProcess(training.tracker, project, folder.path)
        monitor = RunMonitor(folder, state.step, steps, dollars, tracker)
    if training.ledger:
        sources = run.data.names if isinstance(run.data, Mixture) else ()
        ledger = Ledger(folder.ledger, ranks.rank, start.attempt, sources)
    stragglers = Stragglers(ranks, training.straggler_interval)
    profiler = None
    if training.profile_steps is not None:
        traced = StepRange.parse(training.profile_steps)
        profiler = StepProfiler(folder.profile, ranks.rank, traced, state.step)
    communication = None
    interval = training.analysis_interval
    if monitor is not None and ranks.world_size > 1 and interval and not profiler:
        communication = CommunicationShare(interval)
    return Reporter(watchdog, stragglers, monitor, ledger, profiler, communication)

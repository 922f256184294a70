"""Resuming a run: whether its folder allows it, from which checkpoint, and loading that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ten_dist.checkpoint import (
    WEIGHT,
    CheckpointReader,
    RunState,
    checksum_damage,
    damage,
    read_record,
)
from ten_dist.config.training import TrainingConfig
from ten_dist.console import say
from ten_dist.engine.checkpointing.held_state import held_state
from ten_dist.engine.checkpointing.probe import check_probe, run_probe
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import ConfigurationError
from ten_dist.run_folder import RunFolder, checkpoint_step
from ten_dist.run_record import BEFORE_OPTIONS, RunRecord


def recorded_run(folder: RunFolder, run: ResolvedRun) -> RunRecord | None:
    """What an earlier start of this run has recorded; None where there was none.

    Raises:
        ConfigurationError: the folder holds a run that `--resume` does not allow to
            continue, or one with other options; or there is none to extend.
    """
    training = run.training
    if not folder.exists():
        if training.extend and training.resume == "auto":
            raise ConfigurationError(
                f"--extend makes a run longer, and --output_dir {folder.path} holds none: "
                "give the folder of a run, or leave --extend out"
            )
        return None
    if training.resume == "never":
        raise ConfigurationError(
            f"--output_dir {folder.path} already holds a run and --resume is never: "
            "choose another folder, or remove this one"
        )
    before = folder.read()
    _check_origin(folder, training, before)
    inside = Path(training.resume).resolve().parent == folder.checkpoints.resolve()
    if training.extend and training.resume != "auto" and inside:
        raise ConfigurationError(
            f"--extend continues the run in --output_dir {folder.path} from its newest "
            f"checkpoint, and not from --resume {training.resume}: give another "
            "--output_dir to branch off there, or leave --resume out"
        )
    check_same_run(f"--output_dir {folder.path} holds a run", folder, before, run)
    return before


def check_same_run(
    what: str, folder: RunFolder, before: RunRecord, run: ResolvedRun
) -> None:
    """Refuse other options than a run had.

    Another length is none where `--extend` asks for a greater one, or where no step that
    is done had a learning rate that depends on it.

    Args:
        what: names the run in the error.
        folder, before: of that run, with what it has recorded.
        run: what is to go on with it.

    Raises:
        ConfigurationError: options differ.
    """
    run = run.continuing(before)
    recorded, now = dict(before.identity), run.identity()
    if run.training.extend:
        _check_longer(recorded["steps"], now["steps"])
        recorded["steps"] = now["steps"]
    elif recorded["steps"] != now["steps"]:
        newest = folder.newest_checkpoint()
        done = checkpoint_step(newest) if newest else 0
        if done <= before.common_steps(run.schedule):
            recorded["steps"] = now["steps"]
    changed = describe_changes(recorded, now)
    if changed:
        steps = now["steps"]
        only_longer = recorded | {"steps": steps} == now and steps > recorded["steps"]
        raise ConfigurationError(
            f"{what} with other options: {changed}: give the same ones, or choose "
            "another folder"
            + ("; --extend makes the run longer" if only_longer else "")
        )


def _check_origin(
    folder: RunFolder, training: TrainingConfig, before: RunRecord
) -> None:
    """Refuse another `--init_from` than the one that the run began with."""
    if training.init_from is None:
        return
    origin = before.origin
    if origin is None or origin.path != os.path.abspath(training.init_from):
        began = "anew" if origin is None else f"with the weights of {origin.path}"
        raise ConfigurationError(
            f"--output_dir {folder.path} holds a run that began {began}: leave out "
            f"--init_from {training.init_from} to go on with it, or choose another folder"
        )


def _check_longer(before: int, now: int) -> None:
    if now < before:
        raise ConfigurationError(
            f"--extend makes a run longer, and {now:,} steps are fewer than the "
            f"{before:,} that it has: give more --steps, --tokens or --epochs"
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Options that differ, in words; empty where none does."""
    earlier = {n: value for n, value in BEFORE_OPTIONS.items() if n in now}
    before = earlier | before
    return "; ".join(
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def newest_whole(ranks: Ranks, checkpoints: Sequence[Path]) -> Path | None:
    """The first checkpoint without damage; the ranks share the reading of its files.

    Damaged ones are named. Every rank must call this.

    Args:
        checkpoints: newest first; those of rank 0 count.
    """
    for path in ranks.from_first(list(checkpoints)):
        found = _damage(ranks, path)
        if found is None:
            return path
        say(f"passing over a checkpoint: {found}")
    return None


def check_whole(ranks: Ranks, path: Path) -> None:
    """Refuse a checkpoint that is damaged; every rank must call this.

    Raises:
        ConfigurationError: it is.
    """
    found = _damage(ranks, path)
    with ranks.agreeing():
        if found is not None:
            raise ConfigurationError(f"the checkpoint cannot be loaded: {found}")


def _damage(ranks: Ranks, path: Path) -> str | None:
    found = ranks.from_first(damage(path) if ranks.is_first else None)
    if found is None:
        try:
            found = checksum_damage(path, ranks.rank, ranks.world_size)
        except (OSError, ValueError) as error:
            found = f"{path} cannot be read: {error}"
        found = next((d for d in ranks.gather(found) if d is not None), None)
    return found


def check_loadable(path: Path, run: ResolvedRun) -> int:
    """Refuse a whole checkpoint from which this run cannot continue.

    It may have been written by any number of ranks at any ZeRO stage.

    Returns:
        Steps that it has done.

    Raises:
        ConfigurationError: it is one.
    """
    record = read_record(path)
    changed = describe_changes(record.state_identity, run.state_identity())
    if changed:
        raise ConfigurationError(
            f"{path} is of a run with other options: {changed}: give the same ones"
        )
    if record.state.step > run.schedule.steps:
        raise ConfigurationError(
            f"{path} has done {record.state.step} steps, more than the {run.schedule.steps} of "
            "this run: give a longer one, with --steps, --tokens or --epochs"
        )
    return record.state.step


@torch.no_grad()
def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, run: ResolvedRun, path: Path
) -> RunState:
    """Restore weights and moments, and check that they compute what they did.

    Every rank must call this. Each reads only the slices that it holds, and at stages 0
    to 2 all weights, one tensor at a time.

    Returns:
        State of the run that saved it.

    Raises:
        ConfigurationError: it is of another model, or damaged.
        TrainingError: the loaded weights do not compute what the saved ones did.
    """
    held = held_state(engine, ranks)
    with ranks.agreeing(), CheckpointReader(path) as reader:
        reader.check_shapes(held.shapes)
        held.load(reader.read, reader.record.optimizer_steps)
        for name, buffer in held.buffers.items():
            buffer.copy_(reader.tensor(WEIGHT, name))
        record = reader.record
    held.settle()
    found = run_probe(engine, ranks, run).loss
    with ranks.agreeing():
        precisions = {run.training.precision, record.precision}
        check_probe(found, record.probe_loss, precisions)
    return record.state

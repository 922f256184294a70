"""Checkpoints: complete or absent, and exact.

A checkpoint is written by all ranks into a folder with a temporary name. When every rank
has finished, rank 0 records the files with their sizes, renames the folder and then
replaces the pointer `latest`; a run killed in between leaves the checkpoint before it as
the newest. A checkpoint holds DeepSpeed's own state of the model and the optimizer, the
random states of every rank, the position in the data, the metrics so far, and the
weights once more in one safetensors file for use without DeepSpeed.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from safetensors.torch import save_file

from ten_dist.engine.deepspeed_config import zero_stage
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.resume import describe_changes
from ten_dist.errors import ConfigurationError
from ten_dist.files import write_json, write_text
from ten_dist.run_folder import (
    CHECKPOINT_RECORD,
    WEIGHTS_NAME,
    RunFolder,
    checkpoint_damage,
    read_checkpoint_record,
)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    run: ResolvedRun,
    folder: RunFolder,
    step: int,
    metrics: dict[str, Any],
) -> None:
    """Write the checkpoint of a run after `step` steps. Every rank must call this.

    Args:
        engine: model and optimizer.
        ranks: all ranks.
        run: what is being run.
        folder: where.
        step: optimizer steps done.
        metrics: of the last step and the last validation.

    Raises:
        TrainingError: the file system refuses, on any rank; the checkpoints before stay
            as they are.
    """
    name = f"step_{step:08d}"
    final, partial = folder.checkpoints / name, folder.checkpoints / f"{name}.partial"
    with ranks.agreeing():
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    engine.save_checkpoint(str(folder.checkpoints), tag=partial.name, save_latest=False)
    weights = _gather_weights(engine, ranks)
    with ranks.agreeing():
        torch.save(_random_states(), partial / _random_states_name(ranks.rank))
        if ranks.is_first:
            save_file(weights, partial / WEIGHTS_NAME)
    with ranks.agreeing():
        if ranks.is_first:
            record = {
                "format": "ten_dist.checkpoint",
                "version": 1,
                "step": step,
                "consumed_rows": step * run.plan.global_batch_size,
                "metrics": metrics,
                "state_identity": run.state_identity(),
                "world_size": ranks.world_size,
                "zero_stage": engine.zero_optimization_stage(),
                "files": _flushed_files(partial),
            }
            write_json(partial / CHECKPOINT_RECORD, record)
            # A folder of this name is a damaged checkpoint that was passed over.
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            write_text(folder.checkpoints / "latest", name + "\n")
            _delete_old(folder, run.training.keep_checkpoints)


def check_loadable(path: Path, run: ResolvedRun) -> None:
    """Find out whether this run can go on from a checkpoint; nothing is loaded.

    Raises:
        ConfigurationError: it is damaged, of a run that this cannot continue, or was
            written by another number of ranks or another ZeRO stage.
    """
    damage = checkpoint_damage(path)
    if damage is not None:
        raise ConfigurationError(f"the checkpoint cannot be loaded: {damage}")
    record = read_checkpoint_record(path)
    changed = describe_changes(record["state_identity"], run.state_identity())
    if changed:
        raise ConfigurationError(
            f"{path} is of a run with other options: {changed}: give the same ones"
        )
    if record["step"] > run.plan.steps:
        raise ConfigurationError(
            f"{path} has done {record['step']} steps, more than the {run.plan.steps} of "
            "this run: give a longer one, with --steps, --tokens or --epochs"
        )
    if record["world_size"] != run.plan.world_size:
        raise ConfigurationError(
            f"{path} was written by {record['world_size']} ranks, not "
            f"{run.plan.world_size}: start the run on that many"
        )
    stage = zero_stage(run.deepspeed_config)
    if record["zero_stage"] != stage:
        raise ConfigurationError(
            f"{path} was written with ZeRO stage {record['zero_stage']}, not {stage}: "
            "choose a --deepspeed_config of that stage"
        )


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, path: Path
) -> dict[str, Any]:
    """Restore model, optimizer and random states. Every rank must call this.

    Returns:
        The record of the checkpoint: step, consumed_rows, metrics.

    Raises:
        TrainingError: DeepSpeed did not load the checkpoint, on any rank.
    """
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    with ranks.agreeing():
        if loaded is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {path}")
        _set_random_states(
            torch.load(path / _random_states_name(ranks.rank), weights_only=False)
        )
    return read_checkpoint_record(path)


def _gather_weights(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """All parameters and buffers in float32 on rank 0, gathered one at a time."""
    values = {}
    if ranks.is_first:
        for name, buffer in engine.module.named_buffers():
            values[name] = buffer.float().cpu().clone()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], enabled=hasattr(parameter, "ds_id")
        ):
            if ranks.is_first:
                values[name] = parameter.detach().float().cpu().clone()
    return values


def _flushed_files(folder: Path) -> dict[str, int]:
    """Files of a folder and their sizes, once they are on the disk."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            sizes[str(file.relative_to(folder))] = file.stat().st_size
    return sizes


def _delete_old(folder: RunFolder, keep: int | None) -> None:
    for path in folder.all_checkpoints()[keep:] if keep is not None else []:
        # First out of sight: a deletion that is cut off must not leave half of one.
        doomed = path.with_name(path.name + ".partial")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _random_states_name(rank: int) -> str:
    return f"random_rank{rank:04d}.pt"


def _random_states() -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

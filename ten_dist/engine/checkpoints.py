"""Checkpoints: complete or absent, and exact.

A checkpoint is written by all ranks into a folder with a temporary name. When every rank
has finished, rank 0 records the files with their sizes, renames the folder and then
replaces the pointer `latest`; a run killed in between leaves the checkpoint before it as
the newest. A checkpoint holds DeepSpeed's own state of the model and the optimizer, the
random states of every rank, the position in the data, and the weights once more in one
safetensors file for use without DeepSpeed.
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

from ten_dist.engine.distributed import Ranks
from ten_dist.errors import ConfigurationError
from ten_dist.monitor.console import say
from ten_dist.run_folder import (
    CHECKPOINT_RECORD,
    WEIGHTS_NAME,
    RunFolder,
    checkpoint_damage,
    read_checkpoint_record,
    write_json,
    write_text,
)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    folder: RunFolder,
    step: int,
    consumed_rows: int,
) -> Path:
    """Write the checkpoint of a run after `step` steps. Every rank must call this.

    Args:
        engine: model and optimizer.
        ranks: all ranks.
        folder: the run.
        step: optimizer steps done.
        consumed_rows: position in the data.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: the file system refuses; the checkpoints before stay as they are.
    """
    name = f"step_{step:08d}"
    final, partial = folder.checkpoints / name, folder.checkpoints / f"{name}.partial"
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(folder.checkpoints), tag=partial.name, save_latest=False)
    torch.save(_random_states(), partial / _random_states_name(ranks.rank))
    _save_weights(engine, ranks, partial / WEIGHTS_NAME)
    ranks.barrier()
    if ranks.is_first:
        _flush_files(partial)
        files = {
            str(file.relative_to(partial)): file.stat().st_size
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
        record = {
            "format": "ten_dist.checkpoint",
            "version": 1,
            "step": step,
            "consumed_rows": consumed_rows,
            "world_size": ranks.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "files": files,
        }
        write_json(partial / CHECKPOINT_RECORD, record)
        # A folder of this name is left over from a run that was resumed from an earlier
        # checkpoint because this one was damaged.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        write_text(folder.checkpoints / "latest", name + "\n")
    ranks.barrier()
    return final


def find_checkpoint(folder: RunFolder) -> Path | None:
    """The newest complete checkpoint of a run; damaged ones are reported."""
    for path in sorted(folder.checkpoints.glob("step_*"), reverse=True):
        damage = (
            f"{path} was not finished"
            if path.suffix == ".partial"
            else checkpoint_damage(path)
        )
        if damage is None:
            return path
        say(f"passing over a checkpoint: {damage}")
    return None


def check_loadable(path: Path, ranks: Ranks, stage: int) -> dict[str, Any]:
    """The record of a checkpoint that this run can load.

    Raises:
        ConfigurationError: it is damaged, or was written by another number of ranks or
            another ZeRO stage.
    """
    damage = checkpoint_damage(path)
    if damage is not None:
        raise ConfigurationError(f"the checkpoint cannot be loaded: {damage}")
    record = read_checkpoint_record(path)
    if record["world_size"] != ranks.world_size:
        raise ConfigurationError(
            f"{path} was written by {record['world_size']} ranks, not "
            f"{ranks.world_size}: start the run on that many"
        )
    if record["zero_stage"] != stage:
        raise ConfigurationError(
            f"{path} was written with ZeRO stage {record['zero_stage']}, not {stage}: "
            f"choose a --deepspeed_config of that stage"
        )
    return record


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, path: Path
) -> None:
    """Restore model, optimizer and random states. Every rank must call this.

    Raises:
        RuntimeError: DeepSpeed did not load the checkpoint.
    """
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed loaded nothing from {path}")
    _set_random_states(
        torch.load(path / _random_states_name(ranks.rank), weights_only=False)
    )


def _save_weights(engine: deepspeed.DeepSpeedEngine, ranks: Ranks, path: Path) -> None:
    """All weights in float32, gathered one at a time where they are sharded."""
    values = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], enabled=hasattr(parameter, "ds_id")
        ):
            if ranks.is_first:
                values[name] = parameter.detach().float().cpu().clone()
    if ranks.is_first:
        save_file(values, path)


def _flush_files(folder: Path) -> None:
    """Bring the files of a folder to the disk before they are declared complete."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


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

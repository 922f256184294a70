"""`--dry_run`: as much of a real step as fits on this machine, and nothing written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.console import say
from ten_dist.data import Manifest, Mixture, training_batches
from ten_dist.deepspeed_config import derive_deepspeed_config
from ten_dist.engine.assembly import build_engine, build_model
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.swap_folder import swap_folder
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.precision import autocast
from ten_dist.planning.machines import GIB
from ten_dist.planning.memory import forward_memory, peak_memory
from ten_dist.planning.sharding import Sharding, Workload
from ten_dist.schedule import Schedule, make_schedule

# Of the memory that is free now: other processes, and what tensors do not account for.
USABLE_FRACTION = 0.8


def dry_run(ranks: Ranks, run: ResolvedRun, deepspeed_file: dict[str, Any]) -> None:
    """Run `dry_samples` rows, rounded up to one a rank.

    The deepest of these that fits is run, and which one, and why, is said:

    - a training step: forward, backward and update through DeepSpeed;
    - forward: real weights, no gradients;
    - shapes: forward and backward on the meta device, without any values.
    """
    training, config, data = run.training, run.model_config, run.data
    share = -(-training.dry_samples // ranks.world_size)
    training = dataclasses.replace(
        training,
        global_batch_size=share * ranks.world_size,
        micro_batch_size=1,
        steps=1,
        tokens=None,
        epochs=None,
        warmup_steps=0,
    )
    schedule = make_schedule(training, ranks.world_size, data)
    need = estimate_memory(training, config, schedule, ranks, deepspeed_file)
    free = -ranks.largest(-USABLE_FRACTION * _free_memory(ranks))
    batches = _batches(ranks, training, schedule, config, data)
    started = time.perf_counter()
    if need["a training step"] <= free:
        depth, loss = (
            "a training step",
            _training_step(ranks, training, schedule, config, deepspeed_file, batches),
        )
    elif need["forward"] <= free:
        depth, loss = "forward", _forward(ranks, training, config, batches)
    else:
        depth, loss = "shapes", _shapes(config, schedule)
    needs = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in need.items())
    say(
        f"dry run: {depth} of {schedule.global_batch_size} samples of {schedule.seq_len} "
        f"tokens in {time.perf_counter() - started:.1f} s (needed a rank: {needs}; "
        f"usable here: {free / GIB:.1f} GiB)"
    )
    say(f"dry run: {loss}")
    say("dry run: everything is valid, nothing was written")


def estimate_memory(
    training: TrainingConfig,
    config: TemporalEigenstateConfig,
    schedule: Schedule,
    ranks: Ranks,
    deepspeed_file: dict[str, Any],
) -> dict[str, float]:
    """Bytes of tensors that a rank needs for each depth of a dry run."""
    work = Workload(
        rows=schedule.micro_batch_size,
        seq_len=schedule.seq_len,
        accumulation_steps=schedule.accumulation_steps,
        precision=training.precision,
        on_cpu=ranks.device.type == "cpu",
    )
    sharding = Sharding.from_file(deepspeed_file, ranks.world_size)
    return {
        "a training step": peak_memory(config, sharding, work).total,
        "forward": forward_memory(config, work),
    }


def _free_memory(ranks: Ranks) -> float:
    """Bytes that one rank can use."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    free = psutil.virtual_memory().available
    limit, used = (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
    )
    if limit.is_file() and limit.read_text().strip() != "max":
        # A container: the machine's memory is not ours.
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / ranks.local_world_size


def _batches(
    ranks: Ranks,
    training: TrainingConfig,
    schedule: Schedule,
    config: TemporalEigenstateConfig,
    data: Manifest | Mixture | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, [1, T] each, of this rank's samples."""
    if data is not None:
        for batch in training_batches(
            data,
            schedule.batch_shape(ranks.rank),
            seed=training.seed,
            last_step=1,
            num_workers=0,
        ):
            yield batch.inputs, batch.targets
        return
    generator = torch.Generator().manual_seed(training.seed + ranks.rank)
    for _ in range(schedule.accumulation_steps):
        tokens = torch.randint(
            config.vocab_size, (1, schedule.seq_len + 1), generator=generator
        )
        yield tokens[:, :-1], tokens[:, 1:]


def _training_step(
    ranks: Ranks,
    training: TrainingConfig,
    schedule: Schedule,
    config: TemporalEigenstateConfig,
    deepspeed_file: dict[str, Any],
    batches: Iterator[tuple[Tensor, Tensor]],
) -> str:
    deepspeed_config = derive_deepspeed_config(deepspeed_file, training, schedule)
    total = torch.zeros((), device=ranks.device)
    with swap_folder(deepspeed_config, ranks) as deepspeed_config:
        model = build_model(config, training.seed, deepspeed_config)
        engine = build_engine(model, training, deepspeed_config, ranks)
        for inputs, targets in batches:
            losses = engine(inputs.to(ranks.device), targets=targets.to(ranks.device))
            engine.backward(losses["loss"])
            engine.step()
            total += losses["ce_loss"].detach()
    mean = ranks.mean(total).item() / schedule.accumulation_steps
    return f"cross-entropy {mean:.4f} before the update"


@torch.no_grad()
def _forward(
    ranks: Ranks,
    training: TrainingConfig,
    config: TemporalEigenstateConfig,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> str:
    torch.manual_seed(training.seed)
    model = TemporalEigenstateNetwork(config).to(ranks.device).eval()
    total, count = torch.zeros((), device=ranks.device), 0
    for inputs, targets in batches:
        with autocast(ranks.device, training.precision):
            losses = model.compute_loss(
                inputs.to(ranks.device), targets.to(ranks.device)
            )
        total, count = total + losses["ce_loss"], count + 1
    return f"cross-entropy {ranks.mean(total).item() / count:.4f} of initial weights"


def _shapes(config: TemporalEigenstateConfig, schedule: Schedule) -> str:
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(config)
        tokens = torch.zeros(
            schedule.micro_batch_size, schedule.seq_len, dtype=torch.int64
        )
    model.compute_loss(tokens, tokens)["loss"].backward()
    return "shapes of forward and backward agree; no values were computed"

"""`--dry_run`: as much of a real step as fits on this machine, and nothing written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.console import say
from ten_dist.data import training_batches
from ten_dist.deepspeed_config import derive_deepspeed_config
from ten_dist.engine.assembly import build_engine
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.swap_folder import swap_folder
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.precision import autocast
from ten_dist.planning.machines import GIB
from ten_dist.planning.memory import forward_memory, peak_memory
from ten_dist.planning.sharding import Sharding, Workload
from ten_dist.schedule import make_schedule

# Of the memory that is free now: other processes, and what tensors do not account for.
USABLE_FRACTION = 0.8

LossParts = dict[str, Tensor]


def dry_run(ranks: Ranks, run: ResolvedRun) -> None:
    """Run `dry_samples` rows, rounded up to one a rank.

    The deepest of these that fits is run, and which one, and why, is said:

    - a training step: forward, backward and update through DeepSpeed;
    - forward: real weights, no gradients;
    - shapes: forward and backward on the meta device, without any values.
    """
    share = -(-run.training.dry_samples // ranks.world_size)
    training = dataclasses.replace(
        run.training,
        global_batch_size=share * ranks.world_size,
        micro_batch_size=1,
        steps=1,
        tokens=None,
        epochs=None,
        schedule="constant",
        decay_fraction=None,
        min_learning_rate=None,
        warmup_steps=0,
    )
    schedule = make_schedule(training, ranks.world_size, run.data)
    run = dataclasses.replace(
        run,
        training=training,
        schedule=schedule,
        deepspeed_config=derive_deepspeed_config(
            run.deepspeed_config, training, schedule
        ),
    )
    need = estimate_memory(ranks, run)
    free = -ranks.largest(-USABLE_FRACTION * _free_memory(ranks))
    started = time.perf_counter()
    if need["a training step"] <= free:
        depth, found = "a training step", _training_step(ranks, run)
    elif need["forward"] <= free:
        depth, found = "forward", _forward(ranks, run)
    else:
        depth, found = "shapes", _shapes(run)
    needs = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in need.items())
    say(
        f"dry run: {depth} of {schedule.global_batch_size} samples of {schedule.seq_len} "
        f"tokens in {time.perf_counter() - started:.1f} s (needed a rank: {needs}; "
        f"usable here: {free / GIB:.1f} GiB)"
    )
    say(f"dry run: {found}")
    say("dry run: everything is valid, nothing was written")


def estimate_memory(ranks: Ranks, run: ResolvedRun) -> dict[str, float]:
    """Bytes of tensors that a rank needs for each depth of a dry run."""
    work = Workload(
        rows=run.schedule.micro_batch_size,
        seq_len=run.schedule.seq_len,
        accumulation_steps=run.schedule.accumulation_steps,
        precision=run.training.precision,
        optimizer=run.training.optimizer,
        on_cpu=ranks.device.type == "cpu",
    )
    sharding = Sharding.from_file(run.deepspeed_config, ranks.world_size)
    return {
        "a training step": peak_memory(run.model_config, sharding, work).total,
        "forward": forward_memory(run.model_config, work),
    }


def _free_memory(ranks: Ranks) -> float:
    """Bytes that one rank can use."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip() != "max":
        # A container: the machine's memory is not ours.
        used = int(limit.with_name("memory.current").read_text())
        free = min(free, int(limit.read_text()) - used)
    return free / ranks.local_world_size


def _batches(ranks: Ranks, run: ResolvedRun) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, [1, T] each, of this rank's samples."""
    schedule, seed = run.schedule, run.training.seed
    if run.data is not None:
        for batch in training_batches(
            run.data,
            schedule.batch_shape(ranks.rank),
            seed=seed,
            last_step=1,
            num_workers=0,
        ):
            yield batch.inputs, batch.targets
        return
    generator = torch.Generator().manual_seed(seed + ranks.rank)
    for _ in range(schedule.accumulation_steps):
        tokens = torch.randint(
            run.model_config.vocab_size,
            (1, schedule.seq_len + 1),
            generator=generator,
        )
        yield tokens[:, :-1], tokens[:, 1:]


def _mean_loss(
    ranks: Ranks, run: ResolvedRun, compute: Callable[[Tensor, Tensor], LossParts]
) -> float:
    """Cross-entropy of all samples, nats a token."""
    total = torch.zeros(2, device=ranks.device)
    for inputs, targets in _batches(ranks, run):
        losses = compute(inputs.to(ranks.device), targets.to(ranks.device))
        counted = (targets != IGNORED_TARGET).sum().to(ranks.device)
        total += torch.stack([losses["ce_loss"].detach() * counted, counted])
    loss_sum, tokens = ranks.sum(total).tolist()
    return loss_sum / max(tokens, 1)


def _training_step(ranks: Ranks, run: ResolvedRun) -> str:
    with swap_folder(run.deepspeed_config, ranks) as deepspeed_config:
        engine = build_engine(run, deepspeed_config, ranks)

        def train(inputs: Tensor, targets: Tensor) -> LossParts:
            losses = engine(inputs, targets=targets)
            engine.backward(losses["loss"])
            engine.step()
            return losses

        loss = _mean_loss(ranks, run, train)
    return f"cross-entropy {loss:.4f} before the update"


@torch.no_grad()
def _forward(ranks: Ranks, run: ResolvedRun) -> str:
    torch.manual_seed(run.training.seed)
    model = TemporalEigenstateNetwork(run.model_config).to(ranks.device).eval()
    compute = autocast(ranks.device, run.training.precision)(model.compute_loss)
    return f"cross-entropy {_mean_loss(ranks, run, compute):.4f} of initial weights"


def _shapes(run: ResolvedRun) -> str:
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(run.model_config)
        tokens = torch.zeros(1, run.schedule.seq_len, dtype=torch.int64)
    model(tokens, targets=tokens)["loss"].backward()
    return "shapes of forward and backward agree; no values were computed"

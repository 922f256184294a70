"""What benchmarks.engine runs on each rank.

python -m benchmarks.engine_worker FOLDER overhead|memory STAGE
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import paired
from ten_dist.checkpoint import HealthState
from ten_dist.config.training import TrainingConfig
from ten_dist.data import TokenBatch
from ten_dist.deepspeed_config import load_deepspeed_file
from ten_dist.engine.assembly import build_engine
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Health
from ten_dist.engine.resolution import ResolvedRun, resolve
from ten_dist.engine.step import Stepper
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.own_rank import rank_of_environment
from ten_dist.planning.memory import peak_memory
from ten_dist.planning.sharding import Sharding, Workload

PRESET = "pico"
ROWS, SEQ_LEN = 8, 512
STEPS = 20


class NeverStopped:
    """In place of the signals of a run."""

    requested = False


def random_batches(run: ResolvedRun, seed: int) -> Iterator[TokenBatch]:
    """Micro-batches of random tokens, without end."""
    generator = torch.Generator().manual_seed(seed)
    size = run.schedule.micro_batch_size
    zeros = np.zeros(size, dtype=np.int64)
    for step in itertools.count():
        tokens = torch.randint(
            run.model_config.vocab_size,
            (size, run.schedule.seq_len + 1),
            generator=generator,
        )
        yield TokenBatch(step, 0, zeros, zeros, zeros, tokens.numpy())


def prepared_engine(
    preset: str,
    folder: Path,
    *,
    rows: int,
    seq_len: int,
    stage: str = "zero2",
    **model_options: Any,
) -> tuple[deepspeed.DeepSpeedEngine, Ranks, ResolvedRun]:
    """A float32 engine on random tokens, one step done."""
    training = TrainingConfig(
        config=preset,
        output_dir=str(folder / "run"),
        steps=100,
        seq_len=seq_len,
        global_batch_size=rows,
        deepspeed_config=stage,
        precision="fp32",
        # So that the disk has blocks to write to again, as it has for DeepSpeed's.
        keep_checkpoints=1,
        dry_run=True,
    )
    world_size = rank_of_environment(os.environ).world_size
    ranks = Ranks()
    file_config = load_deepspeed_file(stage)
    run = resolve(training, model_options, file_config, world_size)
    engine = build_engine(run, run.deepspeed_config, ranks)
    steps_of(engine, ranks, run)()
    return engine, ranks, run


def steps_of(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    run: ResolvedRun,
    before_update: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """A function that does a training step on random tokens, as the trainer does it."""
    health = Health(run.training.spike_threshold, HealthState())
    stepper = Stepper(
        engine, ranks, run, NeverStopped(), health, before_update=before_update
    )
    batches = random_batches(run, ranks.rank)
    numbers = itertools.count()

    def step() -> None:
        stepper(next(numbers) % 99 + 1, batches)

    return step


def overhead(folder: Path, stage: str) -> dict[str, float]:
    """Median seconds of a step of ours, and of a bare loop."""
    engine, ranks, run = prepared_engine(
        PRESET, folder, rows=ROWS, seq_len=SEQ_LEN, stage=stage
    )
    ours = steps_of(engine, ranks, run)
    batches = random_batches(run, ranks.rank)

    model = TemporalEigenstateNetwork(run.model_config)
    bare = DistributedDataParallel(model)
    groups = model.parameter_groups(run.training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def bare_step() -> None:
        batch = next(batches)
        loss = bare(batch.inputs, targets=batch.targets)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # What any loop that reports its loss must do.
        ranks.mean(loss.detach()).item()

    return paired({"ours": ours, "bare": bare_step}, STEPS)


def live_bytes() -> int:
    """Memory of all tensors of this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(folder: Path, stage: str) -> dict[str, float]:
    """Bytes of a rank's tensors between steps and at the peak of one, and what
    `ten-dist plan` counts of the peak."""
    before = live_bytes()
    engine, ranks, run = prepared_engine(
        "medium",
        folder,
        rows=2,
        seq_len=16,
        stage=stage,
        # An embedding of no larger a part of the model than that of `xlarge`: stage 3 has
        # to hold its largest parameter whole.
        vocab_size=16384,
    )
    batch = next(random_batches(run, ranks.rank))
    held = live_bytes() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        engine.backward(engine(batch.inputs, targets=batch.targets)["loss"])
        engine.step()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    sharding = Sharding.from_file(run.deepspeed_config, ranks.world_size)
    work = Workload(
        run.schedule.micro_batch_size,
        run.schedule.seq_len,
        precision="fp32",
        on_cpu=True,
    )
    return {
        "held": held / run.parameters,
        "peak": (held + max(itertools.accumulate(size for _, size in changes)))
        / run.parameters,
        "planned": peak_memory(run.model_config, sharding, work).total / run.parameters,
    }


def main() -> None:
    """Measure on this rank; rank 0 writes result.json."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, name, stage = Path(arguments[0]), arguments[1], arguments[2]
    result = {"overhead": overhead, "memory": memory}[name](folder, stage)
    if rank_of_environment(os.environ).rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

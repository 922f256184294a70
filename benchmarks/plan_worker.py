"""What benchmarks.plan runs on each rank: real training steps, measured.

python -m benchmarks.plan_worker FOLDER

FOLDER/cases.json is a list of :class:`Case`, as JSON; rank 0 writes FOLDER/measured.json,
one :class:`Measured` for each. Every case runs in a process of its own that is forked
once everything is imported: one finds nothing that another has left in memory, and the
imports are paid once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import torch

from benchmarks.engine_worker import NeverStopped, random_batches
from ten_dist.engine.assembly import build_engine, build_model
from ten_dist.engine.deepspeed_config import load_deepspeed_file
from ten_dist.engine.distributed import Ranks, describe_ranks
from ten_dist.engine.health import Health
from ten_dist.engine.host_memory import keep_freed_memory
from ten_dist.engine.resolution import resolve
from ten_dist.engine.step import Stepper
from ten_dist.training_config import TrainingConfig

STEPS = 3
TINY = {"dim": 8, "n_layers": 1, "num_eigenstates": 4, "num_heads": 2, "vocab_size": 64}


@dataclasses.dataclass(frozen=True)
class Case:
    """A few steps of training on every rank."""

    preset: str
    stage: int
    rows: int
    """Of a micro-batch."""
    seq_len: int
    accumulation_steps: int = 1
    precision: str = "fp32"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Model fields that replace those of the preset."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What rank 0 saw of a case."""

    peak_bytes: int
    """Largest resident memory, less that before the model was built."""
    collectives: dict[str, int]
    """Bytes of one step by collective, as DeepSpeed's comms logger counts them."""


def resident_bytes(name: str) -> int:
    """VmRSS or VmHWM, the resident memory of this process and its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def forget_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def prepared_steps(case: Case, ranks: Ranks) -> Callable[[], None]:
    """An engine for a case; returns what does one of its steps."""
    training = TrainingConfig(
        config=case.preset,
        output_dir="unused",
        steps=100,
        seq_len=case.seq_len,
        micro_batch_size=case.rows,
        global_batch_size=case.rows * case.accumulation_steps * ranks.world_size,
        deepspeed_config=f"zero{case.stage}",
        precision=case.precision,
        dry_run=True,
    )
    file_config = load_deepspeed_file(training.deepspeed_config)
    run = resolve(training, case.model, file_config, ranks.world_size)
    run.deepspeed_config["comms_logger"] = {"enabled": True, "prof_all": True}
    model = build_model(run.model_config, 0, run.deepspeed_config)
    engine = build_engine(model, training, run.deepspeed_config, ranks)
    stepper = Stepper(engine, ranks, run, NeverStopped(), None)
    health = Health(engine.device, training.spike_threshold, {})
    batches = random_batches(run, ranks.rank)
    numbers = itertools.count(1)
    return lambda: stepper(next(numbers), batches, health, [])


def measure(case: Case) -> Measured:
    """Run a case on this rank."""
    ranks = Ranks()
    if not os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        keep_freed_memory()
    # What a first step loads and keeps, whatever the model, is no part of it.
    tiny = dataclasses.replace(case, preset="pico", rows=1, seq_len=8, model=TINY)
    prepared_steps(tiny, ranks)()
    gc.collect()
    forget_peak()
    before = resident_bytes("VmRSS")
    step = prepared_steps(case, ranks)
    logger = deepspeed.comm.comm.comms_logger
    for _ in range(STEPS):
        logger.comms_dict.clear()
        if os.environ.get("TRACE") == "2":
            sys.path.insert(0, "/tmp/m")
            from peaktrace import Peak

            with Peak() as pk:
                step()
            if _ == 1:
                for rss, f, sh, st in pk.log[-9:]:
                    print(
                        "1 rank",
                        ranks.rank,
                        (rss - before) / 1e6,
                        f,
                        sh,
                        st,
                        flush=True,
                    )
        else:
            step()
        if os.environ.get("TRACE"):
            print(
                "1",
                (resident_bytes("VmRSS") - before) / 1e6,
                (resident_bytes("VmHWM") - before) / 1e6,
                flush=True,
            )
    if os.environ.get("TRACE") == "3" and ranks.rank == 0:
        gc.collect()
        seen = {}
        for t in gc.get_objects():
            if (
                isinstance(t, torch.Tensor)
                and t.device.type == "cpu"
                and t.untyped_storage().nbytes() > 1e6
            ):
                seen.setdefault(
                    t.untyped_storage().data_ptr(),
                    (
                        t.untyped_storage().nbytes() / 1e6,
                        tuple(t.shape),
                        type(t).__name__,
                        t.requires_grad,
                        t.grad is not None,
                    ),
                )
        for v in sorted(seen.values(), key=lambda v: -v[0]):
            print("1", v, flush=True)
    collectives = {
        name: sum(size * entries[0] for size, entries in sizes.items())
        for name, sizes in logger.comms_dict.items()
    }
    return Measured(resident_bytes("VmHWM") - before, collectives)


@contextlib.contextmanager
def port_of(case: int) -> Iterator[None]:
    """A rendezvous of its own for a case: the launcher's next ports."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + case)
    yield


def main() -> None:
    """Measure all cases on this rank."""
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("--")))
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text())]
    base = int(os.environ["MASTER_PORT"])
    results = []
    for number, case in enumerate(cases):
        result = folder / f"case{number}.json"
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = str(base + number)
            measured = measure(case)
            if describe_ranks()[0] == 0:
                result.write_text(json.dumps(dataclasses.asdict(measured)))
            deepspeed.comm.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"case {number} failed with status {status}")
        if describe_ranks()[0] == 0:
            results.append(json.loads(result.read_text()))
    if describe_ranks()[0] == 0:
        (folder / "measured.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()

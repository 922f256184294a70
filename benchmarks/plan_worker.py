"""What benchmarks.plan runs on each rank: real training steps, measured.

python -m benchmarks.plan_worker FOLDER

FOLDER/cases.json has `cases`, each a :class:`Case`, and a free port for each; rank 0
writes FOLDER/measured.json, one :class:`Measured` for each. Every case runs in a process
of its own, forked once everything is imported: it finds nothing in memory that another has
left, and the imports are paid once.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import torch

from benchmarks.engine_worker import NeverStopped, random_batches
from ten_dist.checkpoint import HealthState
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.deepspeed_config import load_deepspeed_file
from ten_dist.engine.assembly import build_engine
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Health
from ten_dist.engine.host_memory import keep_freed_memory
from ten_dist.engine.resolution import resolve
from ten_dist.engine.step import Stepper
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.own_rank import rank_of_environment

STEPS = 2
_TINY = {
    "dim": 8,
    "n_layers": 1,
    "num_eigenstates": 8,
    "num_heads": 2,
    "vocab_size": 64,
}


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
    keeps_freed_memory: bool = False
    """As `ten-dist train` does on CPUs; else it is given back, so that resident memory is
    that of the tensors there are."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Model fields that replace those of the preset."""
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of zero_optimization that replace those of ds_configs/."""

    def deepspeed_file(self) -> dict[str, Any]:
        """The DeepSpeed configuration that it is started with."""
        content = load_deepspeed_file(f"zero{self.stage}")
        content["zero_optimization"] |= self.zero
        return content


@dataclasses.dataclass(frozen=True)
class Measured:
    """What rank 0 saw of a case."""

    peak_bytes: int
    """Largest resident memory, less what a tiny model needs."""
    collectives: dict[str, int]
    """Bytes of one step by collective, as DeepSpeed's comms logger counts them: those that
    a rank gives."""


def resident_bytes(name: str) -> int:
    """VmRSS or VmHWM: the resident memory of this process, or its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def forget_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def prepared_steps(case: Case, ranks: Ranks) -> Callable[[], object]:
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
    run = resolve(training, case.model, case.deepspeed_file(), ranks.world_size)
    run.deepspeed_config["comms_logger"] = {"enabled": True, "prof_all": True}
    engine = build_engine(run, run.deepspeed_config, ranks)
    health = Health(training.spike_threshold, HealthState())
    stepper = Stepper(engine, ranks, run, NeverStopped(), health)
    batches = random_batches(run, ranks.rank)
    numbers = itertools.count(1)
    return lambda: stepper(next(numbers), batches)


def measure(case: Case) -> Measured:
    """Run a case on this rank."""
    ranks = Ranks()
    if case.keeps_freed_memory:
        keep_freed_memory()
    # What a first step loads and keeps, whatever the model, is not the model's.
    tiny = dataclasses.replace(
        case, preset="pico", rows=1, seq_len=8, accumulation_steps=1, model=_TINY
    )
    prepared_steps(tiny, ranks)()
    gc.collect()
    forget_peak()
    before = resident_bytes("VmRSS")
    step = prepared_steps(case, ranks)
    sent = deepspeed.comm.comm.comms_logger.comms_dict
    for _ in range(STEPS):
        sent.clear()
        step()
    collectives = {
        name: sum(size * calls[0] for size, calls in sizes.items())
        for name, sizes in sent.items()
    }
    return Measured(resident_bytes("VmHWM") - before, collectives)


def import_everything() -> None:
    """Bring into memory what every case would: the scan, and torch's optimizers."""
    config = TemporalEigenstateConfig(**_TINY)
    model = TemporalEigenstateNetwork(config)
    # No backward: torch refuses it in a process forked after one.
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    torch.optim.AdamW(model.parameters())
    # What DeepSpeed imports when stage 3 is first used: hundreds of modules of torch.
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")


def main() -> None:
    """Measure all cases on this rank."""
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("--")))
    wanted = json.loads((folder / "cases.json").read_text())
    is_first = rank_of_environment(os.environ).rank == 0
    import_everything()
    results = []
    for number, (case, port) in enumerate(zip(wanted["cases"], wanted["ports"])):
        result = folder / f"{number}.json"
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = str(port)
            measured = measure(Case(**case))
            if is_first:
                result.write_text(json.dumps(dataclasses.asdict(measured)))
            # Without waiting for the threads of its process groups.
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"{case} failed")
        if is_first:
            results.append(json.loads(result.read_text()))
    if is_first:
        (folder / "measured.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()

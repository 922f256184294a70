"""Measurements of the training engine on the CPU.

    python -m benchmarks.engine [checkpoint] [overhead] [memory] [--output FILE]

`checkpoint` saves a model of 180 M parameters with its moments, beside DeepSpeed's own
save_checkpoint of the same engine in the same folder: how long training waits, how long
until all is on the disk, and the memory it takes. `overhead` times steps of two ranks
beside a bare torch loop with DistributedDataParallel, the same model and batches.
`memory` compares the tensors of two ranks at ZeRO stages 0 to 3 with what sharding should
save, between steps and at the peak of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import Report, paired, run_measurements, seconds_of

WORKER = "benchmarks.engine_worker"


@contextlib.contextmanager
def growth_of_memory() -> Iterator[list[int]]:
    """Largest growth of this process's resident memory in a block, bytes."""
    process, ended, grown = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.01):
            grown[0] = max(grown[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


def measure_checkpoint(report: Report, folder: Path) -> None:
    """Portable, asynchronous saves beside DeepSpeed's."""
    from benchmarks.engine_worker import prepared_engine, steps_of
    from ten_dist.checkpoint import RunState
    from ten_dist.engine.checkpointing.save import CheckpointWriter
    from ten_dist.run_folder import RunFolder

    engine, ranks, run = prepared_engine("small", folder, rows=1, seq_len=128)
    parameters = sum(p.numel() for p in engine.module.parameters())
    report.add("checkpoint: parameters, millions", parameters / 1e6)
    saved: list[dict[str, Any]] = []
    run_folder = RunFolder(folder / "run")
    writer = CheckpointWriter(engine, ranks, run, run_folder, saved.append)
    train = steps_of(engine, ranks, run, writer.before_update)
    step = 0

    def save_and_train() -> None:
        nonlocal step
        step += 1
        writer.save(RunState(step=step), 0.0)
        train()

    def seconds_beside_a_write(function: Callable[[], None]) -> float:
        seconds = seconds_of(function)
        writer.wait()
        return seconds

    def ours() -> None:
        nonlocal step
        step += 1
        writer.save(RunState(step=step), 0.0)
        writer.wait()

    def deepspeeds(synced: bool = False) -> None:
        # As ours, it deletes the checkpoint before only when there is another: blocks
        # and pages that were just set free are written faster than others.
        before = list((folder / "deepspeed").glob("step*"))
        tag = f"step{time.monotonic_ns()}"
        engine.save_checkpoint(str(folder / "deepspeed"), tag=tag)
        for file in (folder / "deepspeed" / tag).rglob("*") if synced else ():
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        for old in before:
            shutil.rmtree(old)

    def deepspeeds_on_disk() -> None:
        deepspeeds(synced=True)

    for name, save in (("ours", ours), ("DeepSpeed's", deepspeeds)):
        with growth_of_memory() as grown:
            save()
        report.add(
            f"checkpoint: memory of {name}, bytes a parameter", grown[0] / parameters
        )
        os.sync()
    sides = {
        "ours": ours,
        "deepspeed": deepspeeds,
        "deepspeed on disk": deepspeeds_on_disk,
    }
    seconds = paired(sides, 3)
    saved.clear()
    of_steps = paired(
        {"plain": train, "saving": save_and_train}, 5, seconds_beside_a_write
    )
    held = statistics.median(one["checkpoint_held_seconds"] for one in saved)
    written = statistics.median(one["checkpoint_write_seconds"] for one in saved)
    report.add("checkpoint: GB", saved[-1]["checkpoint_bytes"] / 1e9)
    report.add("checkpoint: training waits, s", held)
    report.add("checkpoint: until it is complete, s", seconds["ours"])
    report.add("checkpoint: waiting / writing", held / written)
    report.add("checkpoint: a step, s", of_steps["plain"])
    report.add(
        "checkpoint: a step with a save is longer by, s",
        of_steps["saving"] - of_steps["plain"],
    )
    report.add("checkpoint: DeepSpeed's save_checkpoint, s", seconds["deepspeed"])
    report.add(
        "checkpoint: ours complete / DeepSpeed's, not synced",
        seconds["ours"] / seconds["deepspeed"],
    )
    report.add(
        "checkpoint: ours complete / DeepSpeed's, synced",
        seconds["ours"] / seconds["deepspeed on disk"],
    )
    report.add(
        "checkpoint: training waits / DeepSpeed's save", held / seconds["deepspeed"]
    )


def _launch(folder: Path, *arguments: object) -> dict:
    """Run the worker on two ranks; returns what rank 0 wrote."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [sys.executable, str(launcher), "--num_accelerators", "2"]
    command += ["--module", WORKER, str(folder), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    return json.loads(result.read_text())


def measure_overhead(report: Report, folder: Path) -> None:
    """Steps of two ranks beside a bare loop, in turn."""
    for stage in ("zero0", "zero2"):
        found = _launch(folder, "overhead", stage)
        report.add(f"overhead {stage}: step, s", found["ours"])
        report.add(f"overhead {stage}: bare DDP step, s", found["bare"])
        report.add(f"overhead {stage}: ratio", found["ours"] / found["bare"])


def measure_memory(report: Report, folder: Path) -> None:
    """Tensors of a rank, by stage."""
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        found = _launch(folder, "memory", stage)
        for name, what in (
            ("held", "between steps"),
            ("peak", "peak of a step"),
            ("planned", "peak by ten-dist plan"),
        ):
            report.add(f"memory {stage}: {what}, bytes a parameter", found[name])


MEASUREMENTS: dict[str, Callable[[Report, Path], None]] = {
    "checkpoint": measure_checkpoint,
    "overhead": measure_overhead,
    "memory": measure_memory,
}


if __name__ == "__main__":
    run_measurements(__doc__, MEASUREMENTS)

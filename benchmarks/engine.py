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
import functools
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
from ten_dist.files import sync

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


class _Saves:
    """Saves of one engine, ours and DeepSpeed's; what ours told is in `saved`."""

    def __init__(self, report: Report, folder: Path) -> None:
        from benchmarks.engine_worker import prepared_engine, steps_of
        from ten_dist.engine.checkpointing.save import CheckpointWriter
        from ten_dist.run_folder import RunFolder

        self.folder = folder / "deepspeed"
        self.engine, ranks, run = prepared_engine("small", folder, rows=1, seq_len=128)
        self.parameters = sum(p.numel() for p in self.engine.module.parameters())
        report.add("checkpoint: parameters, millions", self.parameters / 1e6)
        output = RunFolder(folder / "run")
        self.saved: list[dict[str, Any]] = []
        self.writer = CheckpointWriter(
            self.engine, ranks, run, output, self.saved.append
        )
        self.train = steps_of(self.engine, ranks, run, self.writer.before_update)
        self.step = 0

    def begin(self) -> None:
        """Begin a save of ours."""
        from ten_dist.checkpoint import RunState

        self.step += 1
        self.writer.save(RunState(step=self.step), 0.0)

    def end(self) -> None:
        """Wait for a save of ours, if one was begun."""
        self.writer.wait()

    def ours(self) -> None:
        """Save with ours."""
        self.begin()
        self.end()

    def save_and_train(self) -> None:
        """A step with a save of ours that goes on beside it."""
        self.begin()
        self.train()

    def seconds_beside_a_write(self, function: Callable[[], object]) -> float:
        """Seconds of a call, without those until a save that it began is complete."""
        seconds = seconds_of(function)
        self.end()
        return seconds

    def deepspeeds(self, synced: bool = False) -> None:
        """Save with DeepSpeed's, and bring that to the disk."""
        # As ours, it deletes the checkpoint before only when there is another: blocks
        # and pages that were just set free are written faster than others.
        before = list(self.folder.glob("step*"))
        tag = f"step{time.monotonic_ns()}"
        self.engine.save_checkpoint(str(self.folder), tag=tag)
        for file in (self.folder / tag).rglob("*") if synced else ():
            if file.is_file():
                sync(file)
        for old in before:
            shutil.rmtree(old)


def measure_checkpoint(report: Report, folder: Path) -> None:
    """Portable, asynchronous saves beside DeepSpeed's."""
    saves = _Saves(report, folder)
    for name, save in (("ours", saves.ours), ("DeepSpeed's", saves.deepspeeds)):
        with growth_of_memory() as grown:
            save()
        growth = grown[0] / saves.parameters
        report.add(f"checkpoint: memory of {name}, bytes a parameter", growth)
        os.sync()
    sides = {
        "ours": saves.ours,
        "deepspeed": saves.deepspeeds,
        "deepspeed on disk": functools.partial(saves.deepspeeds, synced=True),
    }
    seconds = paired(sides, 3)
    saves.saved.clear()
    sides = {"plain": saves.train, "saving": saves.save_and_train}
    of_steps = paired(sides, 5, saves.seconds_beside_a_write)
    held = statistics.median(one["checkpoint_held_seconds"] for one in saves.saved)
    written = statistics.median(one["checkpoint_write_seconds"] for one in saves.saved)
    longer = of_steps["saving"] - of_steps["plain"]
    whole, deepspeeds = seconds["ours"], seconds["deepspeed"]
    for name, value in {
        "GB": saves.saved[-1]["checkpoint_bytes"] / 1e9,
        "training waits, s": held,
        "until it is complete, s": whole,
        "waiting / writing": held / written,
        "a step, s": of_steps["plain"],
        "a step with a save is longer by, s": longer,
        "DeepSpeed's save_checkpoint, s": deepspeeds,
        "ours complete / DeepSpeed's, not synced": whole / deepspeeds,
        "ours complete / DeepSpeed's, synced": whole / seconds["deepspeed on disk"],
        "training waits / DeepSpeed's save": held / deepspeeds,
    }.items():
        report.add(f"checkpoint: {name}", value)


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

"""What the benchmarks share: timing in turn, and the report."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def paired(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side; all run in turn, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


class Report:
    """Figures in the order they were measured; printed at once, written at the end."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Record and print one figure."""
        self.figures[name] = round(value, 4)
        print(f"{name:58s} {value:12.4g}", flush=True)

    def write(self, path: Path) -> None:
        """Write the figures with what they were measured on."""
        content = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "figures": self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

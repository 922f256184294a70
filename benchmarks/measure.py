"""What the benchmarks share: timing in turn, and the report."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path

import torch


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds that a call takes on the CPU."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def gpu_seconds_of(function: Callable[[], object]) -> float:
    """Seconds from the first to the last work of a call on the current GPU."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def paired(
    sides: dict[str, Callable[[], object]],
    repeats: int,
    timed: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, float]:
    """Median seconds of each side; all run in turn, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            seconds = timed(side)
            if repeat:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def chosen_measurements(
    description: str, measurements: Iterable[str]
) -> tuple[list[str], Path | None]:
    """The measurements that the command line names, or all, and where to write them."""
    known = list(measurements)
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(known))
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}")
    return options.names or known, options.output


def run_measurements(
    description: str, measurements: Mapping[str, Callable[[Report, Path], None]]
) -> None:
    """Run what the command line names, or all, each with a folder of its own.

    Args:
        description: of the benchmark, for its help.
        measurements: by name; each is given the report and an empty folder.
    """
    names, output = chosen_measurements(description, measurements)
    report = Report()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            measurements[name](report, Path(folder))
    if output is not None:
        report.write(output)


def _module_name() -> str:
    """Name of the benchmark that was started, `benchmarks.cpu` for instance."""
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def processor() -> str:
    """What the processor calls itself, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.machine())


def _rounded(value: float) -> float:
    """To four places, small figures to three digits."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.3g}")


class Report:
    """Figures in the order they were measured; printed at once, written at the end."""

    def __init__(self) -> None:
        self.figures: dict[str, float | None] = {}

    def add(self, name: str, value: float) -> None:
        """Record and print one figure."""
        self.figures[name] = _rounded(value)
        print(f"{name:58s} {value:12.4g}", flush=True)

    def row(self, name: str, columns: dict[str, float | None]) -> None:
        """Record and print several figures of one thing; None is one that is unknown."""
        cells = []
        for column, value in columns.items():
            self.figures[f"{name}: {column}"] = (
                value if value is None else _rounded(value)
            )
            cells.append(f"{'-' if value is None else f'{value:.4g}':>10s} {column}")
        print(f"{name:44s}", *cells, flush=True)

    def write(self, path: Path, **facts: object) -> None:
        """Write the figures with what they were measured on, and `facts` more of it."""
        content = {
            "date": date.today().isoformat(),
            "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
            **facts,
            "figures": self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

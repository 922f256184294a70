"""Figures of a quality experiment in a file, and the table of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import processor
from ten_dist.files import write_json


class Results:
    """Figures of one experiment by variant and seed, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"variants": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())

    def runs(self, variant: str) -> dict[str, dict[str, Any]]:
        """Figures by seed."""
        return self.content["variants"].get(variant, {})

    def add(self, variant: str, seed: int, figures: dict[str, Any]) -> None:
        """Keep the figures of one run, on the disk as well."""
        self.content["variants"].setdefault(variant, {})[str(seed)] = _rounded(figures)
        self.content |= {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
            "cores": os.cpu_count(),
        }
        self._write()

    def keep(self, name: str, value: Any) -> None:
        """Keep what follows from the figures beside them."""
        self.content[name] = _rounded(value)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def table(results: Results, name: str, variants: list[str]) -> str:
    """Markdown table: mean and standard deviation over seeds of every figure.

    Seconds are those of the processor in training; older runs have none.
    """
    runs = {variant: list(results.runs(variant).values()) for variant in variants}
    runs = {variant: found for variant, found in runs.items() if found}
    if not runs:
        return f"{name}: nothing measured"
    figures = dict.fromkeys(c for found in runs.values() for run in found for c in run)
    columns = [c for c in figures if c not in ("parameters", "curve")]
    lines = [
        f"| {name} | seeds | parameters | {' | '.join(columns)} |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for variant, found in runs.items():
        cells = [variant, str(len(found)), f"{found[0]['parameters']:,.0f}"]
        for column in columns:
            values = [run[column] for run in found if column in run]
            cells.append(_cell(values, places=0 if column == "seconds" else 4))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_to(run: dict[str, Any], loss: float) -> float | None:
    """Processor time after which the curve of a run first is at `loss` or below, or None."""
    return next((s for _, s, reached in run.get("curve", []) if reached <= loss), None)


def curves(results: Results, name: str, variants: list[str]) -> str:
    """Markdown table: how long each variant takes to where the best transformer ends.

    All losses are those of the curves, which have the same few rows. Figures are means over
    seeds; there are seconds where every seed gets there, as a mean over those alone that do
    would flatter.
    """
    runs = {v: list(results.runs(v).values()) for v in variants}
    runs = {v: found for v, found in runs.items() if found and "curve" in found[0]}
    ends = {
        v: statistics.mean(run["curve"][-1][2] for run in found)
        for v, found in runs.items()
    }
    transformers = {v: end for v, end in ends.items() if "transformer" in v}
    if not transformers:
        return ""
    best = min(transformers, key=transformers.__getitem__)
    lines = [
        f"| {name}: curves | last loss | seconds to that of {best} |",
        "|---|---|---|",
    ]
    for variant, found in runs.items():
        times = [seconds_to(run, ends[best]) for run in found]
        reached = [seconds for seconds in times if seconds is not None]
        cell = _cell(reached if len(reached) == len(times) else [], places=0)
        lines.append(f"| {variant} | {ends[variant]:.4f} | {cell} |")
    return "\n".join(lines)


def _cell(values: list[float], places: int) -> str:
    if not values:
        return "-"
    cell = f"{statistics.mean(values):.{places}f}"
    if len(values) > 1:
        cell += f" ± {statistics.stdev(values):.{places}f}"
    return cell


def _rounded(value: Any) -> Any:
    """To five places, in dictionaries and lists as well."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return round(value, 5)

"""What the folder of a run says of its course, whether it has ended or not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import (
    LegacyEventFileLoader,
)

from ten_dist.errors import ConfigurationError
from ten_dist.monitor.metrics_log import read_metrics
from ten_dist.run_folder import RunFolder, checkpoint_step
from ten_dist.run_record import RunRecord

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure of a run over its steps, N points."""

    steps: np.ndarray
    """[N] int64, increasing."""
    values: np.ndarray
    """[N] float64, all finite."""

    def at(self, steps: np.ndarray) -> np.ndarray:
        """[M] values at some steps, between points on the line that joins them."""
        return np.interp(steps, self.steps, self.values)


@dataclasses.dataclass(frozen=True)
class Start:
    """That a process began to do steps of the run."""

    step: int
    """Steps done before."""
    time: float
    """In seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it."""

    name: str
    record: RunRecord
    curves: dict[str, Curve]
    """By the names of metrics.jsonl."""
    starts: list[Start]
    anomalies: list[tuple[int, str]]
    """Step and kind of each."""
    checkpoints: list[int]
    """Steps of those that are there, oldest first."""
    complete: bool

    @classmethod
    def read(cls, path: Path) -> RunHistory:
        """Read a folder; lines that a kill has cut off are passed over.

        Raises:
            ConfigurationError: it is not that of a run, or has no metrics yet.
        """
        folder = RunFolder(path)
        record = folder.read()
        try:
            curves = _curves(folder.metrics_file)
        except OSError as error:
            raise ConfigurationError(
                f"{folder.metrics_file} cannot be read: {error.strerror}"
            ) from None
        if "loss" not in curves:
            raise ConfigurationError(
                f"{path} has no metrics yet: let the run do its first step"
            )
        return cls(
            name=folder.path.resolve().name,
            record=record,
            curves=curves,
            starts=_starts(folder.tensorboard),
            anomalies=_anomalies(folder.anomalies_file),
            checkpoints=sorted(map(checkpoint_step, folder.all_checkpoints())),
            complete=folder.completed_file.is_file(),
        )

    @property
    def steps(self) -> int:
        """How many are done."""
        return int(self.curves["loss"].steps[-1])

    def axes(self) -> dict[str, Curve]:
        """What a curve can be drawn over, by steps: "tokens", "hours" in which steps were
        done, without what was between them, and where it is known, "dollars"."""
        loss = self.curves["loss"].steps
        seconds = self.curves["step_seconds"].at(loss)
        axes = {
            "tokens": self.curves["tokens"],
            "hours": Curve(loss, np.cumsum(seconds) / _HOUR),
        }
        if "dollars" in self.curves:
            axes["dollars"] = self.curves["dollars"]
        return axes


def named_apart(runs: Sequence[RunHistory]) -> list[RunHistory]:
    """The runs, where several have one name with numbers behind it."""
    alike = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    named = []
    for run in runs:
        seen[run.name] += 1
        name = f"{run.name} ({seen[run.name]})" if alike[run.name] > 1 else run.name
        named.append(dataclasses.replace(run, name=name))
    return named


def _curves(path: Path) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for metrics in read_metrics(path):
        if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
            continue
        for name, value in metrics.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and name != "step" and math.isfinite(value):
                # Of a step that was done again the last one counts.
                points[name][metrics["step"]] = float(value)
    curves = {}
    for name, found in points.items():
        steps = np.array(sorted(found), dtype=np.int64)
        curves[name] = Curve(steps, np.array([found[step] for step in steps.tolist()]))
    return curves


def _starts(folder: Path) -> list[Start]:
    """By the first events of each file of TensorBoard, of which each start has its own."""
    starts = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        # A file of a run that begins just now may be empty, and a damaged one unreadable.
        try:
            for event in LegacyEventFileLoader(str(path)).Load():
                if event.HasField("session_log"):
                    starts.append(Start(event.step - 1, event.wall_time))
                    break
        except Exception:  # noqa: BLE001, S112
            # Whatever a damaged record makes of the loader.
            continue
    return starts


def _anomalies(path: Path) -> list[tuple[int, str]]:
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values: dict[str, Any] = json.loads(line)
                found.append((int(values["step"]), str(values["kind"])))
            except (ValueError, KeyError, TypeError):
                continue
    return found

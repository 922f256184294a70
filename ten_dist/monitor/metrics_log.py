"""metrics.jsonl: one JSON object a line, one line a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ten_dist.files import write_text


class MetricsLog:
    """Appends to the metrics of a run.

    A run that resumes at step s removes the lines of steps after s, which it does again:
    each step must stand in the file once.

    Args:
        path: the file; made if it is absent.
        first_step: steps done when this start of the run begins.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.is_file():
            # A validation before the first step is made again where nothing was saved.
            kept = [m for m in read_metrics(path) if m["step"] <= first_step != 0]
            write_text(path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        """Append and flush one object, which must have `step`."""
        # JSON has no NaN.
        values = {
            name: None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in metrics.items()
        }
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file.

    A line that a kill or a power failure cut off or garbled is passed over.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue

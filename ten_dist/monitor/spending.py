"""What a run has cost so far, where the price of its machines is known."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from ten_dist.monitor.metrics_log import read_metrics

_HOUR = 3600


class Spending:
    """Dollars of a run, over all of its starts.

    Counted is the time in which its processes ran: of this start since the process began,
    of earlier ones until they last wrote to the metrics. Time between starts is not.

    Args:
        dollars_per_hour: price of all machines of the run, or None where it is not known.
        metrics_file: of the run, which may not be there yet.
        last_step: steps of the whole run.
    """

    def __init__(
        self, dollars_per_hour: float | None, metrics_file: Path, last_step: int
    ) -> None:
        self._price = dollars_per_hour
        self._last_step = last_step
        # All but this on a clock that nobody sets.
        age = max(0.0, time.time() - psutil.Process().create_time())
        self._began = time.monotonic() - age
        self._first_step, self._first_step_began = 0, time.monotonic()
        self._before = 0.0
        if dollars_per_hour is not None and metrics_file.is_file():
            written = (m.get("dollars") for m in read_metrics(metrics_file))
            self._before = max((d for d in written if d is not None), default=0.0)

    def begin(self, step: int) -> None:
        """Begin, or begin again, where `step` steps are done."""
        self._first_step, self._first_step_began = step, time.monotonic()

    def metrics(self, step: int) -> dict[str, float]:
        """After `step` steps: `dollars` so far, and `estimated_dollars` of the whole run at
        the pace of this start; nothing where the price is not known."""
        if self._price is None:
            return {}
        now = time.monotonic()
        spent = self._before + self._price * (now - self._began) / _HOUR
        done = max(1, step - self._first_step)
        remaining = (now - self._first_step_began) / done * (self._last_step - step)
        return {
            "dollars": spent,
            "estimated_dollars": spent + self._price * remaining / _HOUR,
        }

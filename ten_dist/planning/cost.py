"""What a run costs."""

from __future__ import annotations

import dataclasses

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    seconds: float
    gpus: int
    dollars_per_gpu_hour: float | None
    """Price, or None where it is not known."""

    @property
    def days(self) -> float:
        """From its first step to its last."""
        return self.seconds / (24 * _HOUR)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together, which are paid for whether they wait or not."""
        return self.gpus * self.seconds / _HOUR

    @property
    def dollars(self) -> float | None:
        """Price of all of it, or None."""
        if self.dollars_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.dollars_per_gpu_hour

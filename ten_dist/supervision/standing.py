"""What the folder of a run says of how far it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ten_dist.monitor.metrics_log import read_metrics
from ten_dist.run_folder import RunFolder, checkpoint_step


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far a run is between two starts."""

    completed: bool
    """Whether it has said so itself."""
    checkpoint: Path | None
    """What the next start continues from."""
    checkpoint_step: int
    """Steps of it; 0 where there is none."""
    last_step: int
    """The last step in the metrics, which may be after the checkpoint; 0 without any."""
    metrics_version: tuple[int, ...] | None
    """Differs after the metrics were written to; None where there are none."""

    def describe(self) -> str:
        """Where the next start begins, in words."""
        if self.checkpoint is None:
            return "initial weights"
        return f"{self.checkpoint.name}, {self.checkpoint_step:,} steps done"


def standing(folder: RunFolder) -> Standing:
    """Look into the folder of a run, or where it will be."""
    checkpoint = folder.newest_checkpoint()
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    last_step, version = 0, None
    if folder.metrics_file.is_file():
        found = folder.metrics_file.stat()
        # A start that continues makes the file anew, also where no line is different.
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        steps = [m["step"] for m in read_metrics(folder.metrics_file) if "step" in m]
        last_step = max(steps, default=0)
    return Standing(
        folder.completed_file.is_file(), checkpoint, step, last_step, version
    )

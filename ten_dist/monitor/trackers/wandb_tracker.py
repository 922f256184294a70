"""Weights & Biases. WANDB_MODE=offline keeps everything in the folder of the run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb


class WandbTracker:
    """A run at wandb, which merges what comes for one step and refuses earlier steps."""

    def __init__(self, run: Any) -> None:
        self.id = str(run.id)
        self._run = run
        self._step = 0

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        # What a checkpoint took is known steps later, and would be dropped at its own.
        self._step = max(self._step, step)
        self._run.log(dict(figures), step=self._step)

    def finish(self) -> None:
        self._run.finish()


def open_run(
    known_id: str | None, project: str, run: Path, config: dict[str, Any]
) -> WandbTracker:
    folder = run / "trackers"
    return WandbTracker(
        wandb.init(
            project=project,
            id=known_id or uuid.uuid4().hex[:16],
            name=run.name,
            resume="allow",
            config=config,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            # Code and output of this process say nothing of the run.
            settings=wandb.Settings(console="off", silent=True, save_code=False),
        )
    )

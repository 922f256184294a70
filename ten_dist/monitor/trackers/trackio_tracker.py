"""trackio. Figures stay on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio


class TrackioTracker:
    """A run of a trackio project, known by its name; it keeps whatever comes."""

    def __init__(self, run: Any) -> None:
        self.id = str(run.name)
        self._run = run

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        self._run.finish()


def open_run(
    known_id: str | None, project: str, run: Path, config: dict[str, Any]
) -> TrackioTracker:
    return TrackioTracker(
        trackio.init(
            project=project,
            # Names are all that tells its runs apart.
            name=known_id or f"{run.name}-{uuid.uuid4().hex[:8]}",
            resume="allow",
            config=config,
            embed=False,
        )
    )

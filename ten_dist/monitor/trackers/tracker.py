"""What a tracker is, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ten_dist.extras import require_packages

_PACKAGES = ("wandb", "mlflow", "trackio")
"""Each is the name of an extra and of what it installs, with a file here."""


class Tracker(Protocol):
    """One run at a tracker. Methods raise whatever its package raises."""

    id: str
    """What the tracker knows the run by, to be given when it is opened again."""

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Pass on figures of a step by their tags; steps never fall by much."""

    def finish(self) -> None:
        """Wait until the tracker has everything."""


def check_installed(name: str) -> None:
    """Raise a ConfigurationError unless the package of a tracker is installed."""
    assert name in _PACKAGES
    require_packages(f"--tracker {name}", [name], name)


def open_tracker(
    name: str, known_id: str | None, project: str, run: Path, config: dict[str, Any]
) -> Tracker:
    """Begin the run at a tracker, or go on with it.

    Args:
        name: of the tracker, such as wandb.
        known_id: that of the run where it is there already.
        project: that the run belongs to; MLflow calls it experiment.
        run: folder of the run, whose name the run is shown by.
        config: options of the run.
    """
    module = importlib.import_module(f"{__package__}.{name}_tracker")
    opened: Tracker = module.open_run(known_id, project, run, config)
    return opened

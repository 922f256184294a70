"""MLflow. MLFLOW_TRACKING_URI says which server, or which database such as sqlite:///FILE."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus

_LONGEST_VALUE = 500
_MOST_PARAMETERS = 100


class MlflowTracker:
    """A run of an MLflow experiment, which keeps whatever comes, steps in any order."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.id = run_id
        self._client = client

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        points = [Metric(tag, value, now, step) for tag, value in figures.items()]
        self._client.log_batch(self.id, points)

    def finish(self) -> None:
        self._client.set_terminated(self.id)


def open_run(
    known_id: str | None, project: str, run: Path, config: dict[str, Any]
) -> MlflowTracker:
    client = MlflowClient()
    if known_id is not None:
        client.update_run(known_id, RunStatus.to_string(RunStatus.RUNNING))
        return MlflowTracker(client, known_id)
    experiment = client.get_experiment_by_name(project)
    experiment_id = (
        client.create_experiment(project)
        if experiment is None
        else experiment.experiment_id
    )
    run_id = client.create_run(experiment_id, run_name=run.name).info.run_id
    # Parameters cannot be changed: only the first start of a run gives them.
    parameters = [Param(n, str(v)[:_LONGEST_VALUE]) for n, v in config.items()]
    for start in range(0, len(parameters), _MOST_PARAMETERS):
        client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
    return MlflowTracker(client, run_id)

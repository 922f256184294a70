"""The process that passes figures on to a tracker: `python -m ... NAME RUN PROJECT`.

It reads lines of JSON, `[step, {tag: value}]`, from its standard input until that ends. So
a tracker that hangs, fails or takes over signals does it here, and not in the training; and
what a training has said before it was killed still arrives.

`RUN/trackers/NAME.json` keeps by which id the tracker knows the run, and up to which step
it has each tag. None of the trackers can take a point back: steps that a run does again,
after a kill or a rollback, are not sent again, and each curve has each step once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ten_dist.monitor.trackers.tracker import Tracker, open_tracker

_SECONDS_TO_FINISH = 120
"""After the training has ended, so that a tracker out of reach leaves no process behind."""


class Sent:
    """What a tracker was sent of a run.

    Args:
        path: of the file that keeps it.
        project: whose run it is; in another project it is another run.
    """

    def __init__(self, path: Path, project: str) -> None:
        self._path = path
        self._project = project
        self.id: str | None = None
        self._steps: dict[str, int] = {}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["project"] == project:
                self.id, self._steps = known["id"], known["steps"]

    def new(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Those of the figures of a step that were not sent yet."""
        return {t: v for t, v in figures.items() if step > self._steps.get(t, -1)}

    def record(self, step: int, tags: Iterable[str]) -> None:
        """Keep that figures of a step are sent."""
        self._steps |= dict.fromkeys(tags, step)
        values = {"project": self._project, "id": self.id, "steps": self._steps}
        # Complete or absent; not synced, which at each step would wear a disk out.
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        os.replace(temporary, self._path)


def main(arguments: list[str]) -> int:
    """Pass everything on; returns the exit status."""
    name, run, project = arguments
    try:
        _send_all(name, Path(run), project)
    except Exception as error:  # noqa: BLE001
        # Whatever a tracker's package raises. The last line is what the user is told.
        traceback.print_exc()
        reason = " ".join(str(error).split())
        print(f"{type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        return 1
    return 0


def _send_all(name: str, run: Path, project: str) -> None:
    sent = Sent(run / "trackers" / f"{name}.json", project)
    tracker: Tracker | None = None
    for line in sys.stdin:
        step, figures = json.loads(line)
        if tracker is None:
            tracker = open_tracker(name, sent.id, project, run.resolve(), _config(run))
            sent.id = tracker.id
        figures = sent.new(step, figures)
        if figures:
            # Before it is sent: killed in between, a point is missing and none is double.
            sent.record(step, figures)
            tracker.send(step, figures)
    signal.alarm(_SECONDS_TO_FINISH)
    if tracker is not None:
        tracker.finish()


def _config(run: Path) -> dict[str, Any]:
    """Options of the run and of its model, by name."""
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {**record["model"], **record["training"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

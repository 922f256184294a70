"""A page of HTML that compares runs and needs nothing else.

The curves are drawn by a script of our own on a canvas: the libraries that would do it are
as large as all the data of a report, or ask a server for their parts.
"""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from ten_dist.report.run_history import Curve, RunHistory
from ten_dist.report.thinning import extremes, means

_CHARTS = {
    "held-out bits per byte": "val_bits_per_byte",
    "held-out loss, nats a token": "val_loss",
    "cross-entropy, nats a token": "ce_loss",
    "energy": "energy_loss",
    "gradient norm": "gradient_norm",
    "learning rate": "learning_rate",
    "tokens a second": "tokens_per_second",
    "model FLOPs utilization": "mfu",
    "share of data in a step": "data_share",
    "share of communication in a step": "communication_share",
    "memory, bytes": "memory_bytes",
}
_UNTOLD = {"output_dir", "resume", "extend", "config"}
"""Options in which all runs differ, or that say what others say."""
_AXIS_POINTS = 400


class _Page(Template):
    """A template in which the script's own dollars mean nothing."""

    delimiter = "@@"


def page_of(runs: Sequence[RunHistory]) -> str:
    """The page of some runs, the first of which the others are compared with."""
    source = (
        resources.files("ten_dist.report")
        .joinpath("comparison.html")
        .read_text("utf-8")
    )
    return _Page(source).substitute(
        title=html.escape(", ".join(run.name for run in runs)),
        note=html.escape(_note(runs)),
        summary=_table(["", *(run.name for run in runs)], _summary(runs)),
        options=_table(["option", *(run.name for run in runs)], _differences(runs))
        or "<p>None.</p>",
        starts=_table(["run", "start", "after step", "at"], _starts(runs)),
        data=_for_script(
            {"charts": _charts(runs), "runs": [_run(run) for run in runs]}
        ),
    )


def _note(runs: Sequence[RunHistory]) -> str:
    if len({run.record.data.tokenizer_sha256 for run in runs}) > 1:
        return (
            "The runs have different tokenizers: losses a token do not compare, bits per "
            "byte of text do."
        )
    return ""


def _summary(runs: Sequence[RunHistory]) -> list[list[str]]:
    rows = {
        "state": ["complete" if r.complete else "not complete" for r in runs],
        "steps": [f"{r.steps:,} of {r.record.schedule.steps:,}" for r in runs],
        "tokens": [_last(r, "tokens", ",.0f") for r in runs],
        "held-out bits per byte, best": [_best(r, "val_bits_per_byte") for r in runs],
        "held-out loss, best": [_best(r, "val_loss") for r in runs],
        "held-out loss, last": [_last(r, "val_loss", ".4f") for r in runs],
        "cross-entropy, last": [_last(r, "ce_loss", ".4f") for r in runs],
        "hours of steps": [f"{r.axes()['hours'].values[-1]:.3g}" for r in runs],
        "tokens a second, median": [
            _median(r, "tokens_per_second", ",.0f") for r in runs
        ],
        "model FLOPs utilization, median": [_median(r, "mfu", ".1%") for r in runs],
        "dollars": [_last(r, "dollars", ".2f") for r in runs],
        "starts": [str(max(len(r.starts), 1)) for r in runs],
        "anomalies": [_anomalies(r) for r in runs],
        "checkpoints at steps": [_listed(r.checkpoints) for r in runs],
        "device, versions": [_versions(r) for r in runs],
    }
    rows |= _tasks(runs)
    return [[name, *values] for name, values in rows.items() if set(values) != {"-"}]


def _tasks(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    names = dict.fromkeys(n for r in runs for n in r.curves if n.startswith("task/"))
    return {
        name.removeprefix("task/"): [_last(r, name, ".4f") for r in runs]
        for name in names
    }


def _last(run: RunHistory, name: str, shape: str) -> str:
    curve = run.curves.get(name)
    return "-" if curve is None else format(curve.values[-1], shape)


def _best(run: RunHistory, name: str) -> str:
    curve = run.curves.get(name)
    if curve is None:
        return "-"
    at = int(curve.values.argmin())
    return f"{curve.values[at]:.4f} at step {curve.steps[at]:,}"


def _median(run: RunHistory, name: str, shape: str) -> str:
    curve = run.curves.get(name)
    return "-" if curve is None else format(float(np.median(curve.values)), shape)


def _anomalies(run: RunHistory) -> str:
    if not run.anomalies:
        return "0"
    steps = _listed([step for step, _ in run.anomalies])
    return f"{len(run.anomalies)}, at steps {steps}"


def _listed(steps: Sequence[int], most: int = 6) -> str:
    if not steps:
        return "-"
    shown = ", ".join(f"{step:,}" for step in steps[-most:])
    return shown if len(steps) <= most else f"..., {shown}"


def _versions(run: RunHistory) -> str:
    return ", ".join(f"{name} {v}" for name, v in run.record.versions.items())


def _differences(runs: Sequence[RunHistory]) -> list[list[str]]:
    """Options that are not the same in all runs, those of the model first."""
    known = []
    for run in runs:
        content = run.record.to_dict()
        options = {**content["model"], **content["training"]}
        known.append({n: "-" if v is None else str(v) for n, v in options.items()})
    names = dict.fromkeys(name for options in known for name in options)
    rows = [[name, *(o.get(name, "-") for o in known)] for name in names]
    return [row for row in rows if row[0] not in _UNTOLD and len(set(row[1:])) > 1]


def _starts(runs: Sequence[RunHistory]) -> list[list[str]]:
    rows = []
    for run in runs:
        for number, start in enumerate(run.starts, start=1):
            at = datetime.datetime.fromtimestamp(start.time, datetime.UTC)
            words = at.strftime("%Y-%m-%d %H:%M:%S UTC")
            rows.append([run.name, str(number), f"{start.step:,}", words])
    return rows


def _table(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _charts(runs: Sequence[RunHistory]) -> list[dict[str, str]]:
    """Those of which any run has a curve; benchmarks at the end."""
    tasks = {n: n for n in _tasks(runs)}
    charts = {**_CHARTS, **{title: f"task/{name}" for title, name in tasks.items()}}
    return [
        {"title": title, "name": name}
        for title, name in charts.items()
        if any(name in run.curves for run in runs)
    ]


def _run(run: RunHistory) -> dict[str, Any]:
    """What the script draws of a run."""
    names = [*_CHARTS.values(), *(n for n in run.curves if n.startswith("task/"))]
    curves = {n: run.curves[n] for n in names if n in run.curves}
    return {
        "name": run.name,
        "curves": {
            name: {
                "measured": _points(extremes(curve)),
                "means": _points(means(curve)),
            }
            for name, curve in curves.items()
        },
        "axes": {name: _points(_evenly(axis)) for name, axis in run.axes().items()},
        "starts": [start.step for start in run.starts],
        "anomalies": [step for step, _ in run.anomalies],
    }


def _evenly(axis: Curve) -> Curve:
    index = np.unique(np.linspace(0, len(axis.steps) - 1, _AXIS_POINTS, dtype=np.int64))
    return Curve(axis.steps[index], axis.values[index])


def _points(curve: Curve) -> dict[str, list[float]]:
    values = [float(f"{value:.6g}") for value in curve.values.tolist()]
    return {"steps": curve.steps.tolist(), "values": values}


def _for_script(value: Any) -> str:
    """JSON inside a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")

"""The table of the README: what was measured beside a transformer, from benchmarks/results/."""

from __future__ import annotations

import json
import statistics

from docs.generate.pages import ROOT, with_part

# Variants by their names in benchmarks/experiments.py: the defaults beside the best transformer
# of a sweep, and what was compared before there was one.
_TUNED = "TEN, gated MLP: muon 0.008, AdamW 0.004", "modern transformer: muon 0.016"
_BEFORE = "+ memory by depth", "transformer"
_QUALITY = (
    ("characters-tuned", _TUNED, "loss", "characters, 64 of context, 0.8 M parameters"),
    (
        "characters-256",
        _BEFORE,
        "loss",
        "characters, 256 of context, 0.8 M parameters, AdamW for both",
    ),
    (
        "tokens",
        _BEFORE,
        "loss",
        "tokens, 512 of context, 2.1 M parameters, AdamW for both",
    ),
    (
        "tokens",
        _BEFORE,
        "loss at 8192",
        "the same at 8,192 tokens, longer than in training",
    ),
)


def page() -> str:
    """The text of README.md with the table as it should be."""
    lines = [
        "| | TEN | transformer | command |",
        "|---|---|---|---|",
        *(_quality_row(*row) for row in _QUALITY),
        *(_speed_row(steps) for steps in (2048, 8192)),
    ]
    return with_part("README.md", "results", "\n".join(lines))


def _quality_row(
    experiment: str, variants: tuple[str, str], figure: str, what: str
) -> str:
    content = _read(f"quality-{experiment}")
    cells = [
        _mean([run[figure] for run in content["variants"][variant].values()])
        for variant in variants
    ]
    needs = "--data DATA" if experiment == "tokens" else "--corpus FILE"
    command = f"python -m benchmarks.quality {experiment} {needs}"
    return f"| held-out loss, {what}: nats | {' | '.join(cells)} | `{command}` |"


def _speed_row(steps: int) -> str:
    figures = _read("cpu-step")["figures"]
    cells = [
        f"{figures[f'step {model} bf16 T={steps}: tokens/s']:,.0f}"
        for model in ("ten", "transformer")
    ]
    what = f"training on two CPU cores, bfloat16, 41 M parameters, plain MLPs, rows of {steps:,}: tokens/s"
    return f"| {what} | {' | '.join(cells)} | `python -m benchmarks.cpu step` |"


def _read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _mean(values: list[float]) -> str:
    """With the deviation over seeds, where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ± {statistics.stdev(values):.3f}"

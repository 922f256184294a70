"""The ladder of the quality experiments: models of two sizes on 1, 4 and 16 times the tokens.

Each rung is a training of its own, to the end of its schedule, so that its loss is what its
tokens are worth. To the rungs of a model of one size a curve is fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy

from benchmarks.baselines import BaselineConfig
from benchmarks.fitting import Experiment, ModelConfig, Recipe
from benchmarks.quality_results import Results
from benchmarks.tasks import TokenShards
from ten_dist import TemporalEigenstateConfig

CONTEXT, ROWS = 512, 16
FIRST_STEPS = 640
"""Steps of the first rung: 5.2 M tokens."""
MULTIPLES = (1, 4, 16)
EXPONENTS = numpy.linspace(0.01, 1.5, 150)

# The smaller ones first: in this order rungs are trained.
MODELS: dict[str, ModelConfig] = {
    "TEN, 2 M": TemporalEigenstateConfig(
        dim=160, n_layers=4, num_eigenstates=240, num_heads=4, ffn_multiplier=1.8,
        ffn_gate=True, max_timescale=float(CONTEXT),
    ),
    "modern transformer, 2 M": BaselineConfig(
        mixer="attention", dim=160, n_layers=4, ffn_dim=544, num_heads=5
    ),
    "TEN, 10 M": TemporalEigenstateConfig(
        dim=320, n_layers=8, num_eigenstates=360, num_heads=6, ffn_multiplier=1.35,
        ffn_gate=True, max_timescale=float(CONTEXT),
    ),
    "modern transformer, 10 M": BaselineConfig(
        mixer="attention", dim=320, n_layers=8, ffn_dim=704, num_heads=10
    ),
}  # fmt: skip
RATES = {"TEN": 8e-3, "modern transformer": 16e-3}
"""Muon's, the best ones of characters-tuned; not swept here."""


def make_ladder(data: Path) -> Experiment:
    """All rungs, those that take the least work first."""
    variants, changes = {}, {}
    sizes = sorted(
        {model.split(", ")[1] for model in MODELS}, key=lambda s: int(s[:-2])
    )
    rungs = [(size, multiple) for size in sizes for multiple in MULTIPLES]
    for size, multiple in sorted(rungs, key=lambda r: int(r[0][:-2]) * r[1]):
        for model in (m for m in MODELS if m.endswith(f", {size}")):
            name = rung(model, multiple)
            variants[name] = MODELS[model]
            changes[name] = {
                "steps": FIRST_STEPS * multiple,
                "muon_learning_rate": RATES[model.split(",")[0]],
            }
    return Experiment(
        TokenShards(data, CONTEXT, lengths=(16 * CONTEXT,)),
        Recipe(steps=FIRST_STEPS, rows=ROWS, precision="bf16", evaluations=20),
        variants,
        changes,
    )


def rung(model: str, multiple: int) -> str:
    """Name of the variant that trains `model` on a multiple of the tokens."""
    return f"{model}, {multiple}x"


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = a + b x^-c."""

    a: float
    b: float
    c: float

    def __str__(self) -> str:
        return f"{self.a:.3f} + {self.b:.4g} x^-{self.c:.2f}"


def fit_power_law(x: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The power law of the least sum of squared errors, with a, b >= 0.

    For each c from 0.01 to 1.5 in steps of 0.01 a and b are those of linear least squares,
    or, where a would be negative, a is 0 and b that of least squares without it. Three
    points determine three numbers: such a curve says nothing of its own error.

    Args:
        x: tokens or seconds, at least three different ones.
        losses: at each of them.

    Raises:
        ValueError: there are fewer than three different x.
    """
    if len(set(x)) < 3:
        raise ValueError("a curve takes three rungs at least")
    y, middle = numpy.array(losses), float(numpy.exp(numpy.log(x).mean()))
    best, least = PowerLaw(0.0, 0.0, 0.0), float("inf")
    for c in EXPONENTS:
        # Beside the middle of x, as the powers of x itself may be very small.
        powers = (numpy.array(x) / middle) ** -c
        design = numpy.stack([numpy.ones_like(powers), powers], axis=1)
        a, b = numpy.linalg.lstsq(design, y, rcond=None)[0]
        if a < 0:
            a, b = 0.0, powers @ y / (powers @ powers)
        error = float(((a + b * powers - y) ** 2).sum())
        if b >= 0 and error < least:
            best, least = PowerLaw(float(a), float(b * middle**c), float(c)), error
    return best


def fitted(results: Results) -> str:
    """Markdown table of the curves against tokens and against seconds, kept in the results."""
    lines = [
        "| ladder | rungs | loss by tokens | loss by processor seconds |",
        "|---|---|---|---|",
    ]
    curves = {}
    for model in MODELS:
        tokens, seconds, losses = [], [], []
        for multiple in MULTIPLES:
            for run in results.runs(rung(model, multiple)).values():
                tokens.append(FIRST_STEPS * multiple * ROWS * CONTEXT)
                seconds.append(run["seconds"])
                losses.append(run["loss"])
        if len(set(tokens)) < 3:
            lines.append(f"| {model} | {len(set(tokens))} | not yet | not yet |")
            continue
        laws = [fit_power_law(x, losses) for x in (tokens, seconds)]
        curves[model] = dict(zip(("tokens", "seconds"), map(dataclasses.asdict, laws)))
        lines.append(f"| {model} | {len(set(tokens))} | {laws[0]} | {laws[1]} |")
    results.keep("curves", curves)
    return "\n".join(lines)

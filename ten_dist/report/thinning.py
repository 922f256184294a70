"""Fewer points of a curve, with all that a picture of it would show."""

from __future__ import annotations

import itertools

import numpy as np

from ten_dist.report.run_history import Curve

_MOST_PARTS = 600


def extremes(curve: Curve, parts: int = _MOST_PARTS) -> Curve:
    """The least and the largest value of each of many equal parts, and both ends.

    A spike of a single step stays where and as high as it was.
    """
    count = len(curve.steps)
    if count <= 2 * parts:
        return curve
    kept = {0, count - 1}
    for first, last in _parts(count, parts):
        part = curve.values[first:last]
        kept |= {int(first + part.argmin()), int(first + part.argmax())}
    index = np.array(sorted(kept))
    return Curve(curve.steps[index], curve.values[index])


def means(curve: Curve, parts: int = _MOST_PARTS) -> Curve:
    """The mean of each of many equal parts, at its last step."""
    count = len(curve.steps)
    if count <= parts:
        return curve
    ends = [*_parts(count, parts)]
    return Curve(
        np.array([curve.steps[last - 1] for _, last in ends]),
        np.array([curve.values[first:last].mean() for first, last in ends]),
    )


def _parts(count: int, parts: int) -> itertools.pairwise[tuple[int, int]]:
    return itertools.pairwise(np.linspace(0, count, parts + 1, dtype=np.int64).tolist())

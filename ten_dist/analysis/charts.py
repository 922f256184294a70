"""Curves and bars of an analysis, beside the pictures of :mod:`ten_dist.analysis.figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ten_dist.analysis.condition import Condition
from ten_dist.analysis.context_length import ContextLoss, where_it_stops
from ten_dist.analysis.figures import COLOURS, INK, new_figure, place_label, styled
from ten_dist.analysis.influence import Influence
from ten_dist.analysis.places import Place
from ten_dist.analysis.worth import Worth

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def influence_figure(influence: Influence) -> Figure:
    """Influence against lag, and the lags up to which half and nine tenths of it lie."""
    past = influence.by_lag[1:]
    lags = np.arange(1, past.size + 1)
    # Of single lags far back there is little, and much noise: in bins of equal width here.
    edges = np.unique(np.geomspace(1, past.size + 1, 60).astype(int))
    sums = np.add.reduceat(past, edges[:-1] - 1)
    centres = np.sqrt(edges[:-1] * (edges[1:] - 1))
    with styled():
        figure = new_figure(5.5, 3)
        axes = figure.add_subplot()
        axes.plot(centres, sums / np.diff(edges), color=COLOURS[0], marker=".")
        for share, style in ((0.5, "--"), (0.9, ":")):
            lag = influence.lag_of_share(share)
            if lag is not None:
                label = f"{100 * share:.0f} % within {lag:,}"
                axes.axvline(lag, color=COLOURS[1], linestyle=style, label=label)
        axes.set_xscale("log")
        if (sums > 0).any():
            axes.set_yscale("log", nonpositive="mask")
        axes.set(xlabel="tokens before the last", ylabel="influence of a token")
        axes.set_xlim(1, max(2, lags.size))
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def worth_figure(worth: Mapping[str, Sequence[Worth]]) -> Figure:
    """The rise of the loss without each part, by kind of part, with two standard errors."""
    kinds = [kind for kind, parts in worth.items() if parts]
    sizes = [len(worth[kind]) for kind in kinds]
    with styled():
        figure = new_figure(5.5, 0.26 * sum(sizes) + 0.45 * len(kinds) + 0.5)
        panels = np.ravel(
            figure.subplots(
                len(kinds), 1, sharex=True, squeeze=False, height_ratios=sizes
            )
        )
        for number, (kind, axes) in enumerate(zip(kinds, panels)):
            parts = worth[kind]
            errors = [2 * np.nan_to_num(part.standard_error) for part in parts]
            axes.barh(
                [part.part for part in parts],
                [part.rise for part in parts],
                xerr=errors,
                color=COLOURS[number],
                ecolor=INK,
                height=0.7,
            )
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.invert_yaxis()
        panels[-1].set_xlabel("rise of the held-out loss without it, nats a token")
    return figure


def context_figure(contexts: Sequence[ContextLoss]) -> Figure:
    """The loss against how much context was given, and where it stops to fall."""
    at = [loss.context for loss in contexts]
    # Of a sum of changes, each measured at places of its own.
    squares = np.cumsum([np.nan_to_num(loss.standard_error) ** 2 for loss in contexts])
    with styled():
        figure = new_figure(5.5, 3)
        axes = figure.add_subplot()
        axes.errorbar(
            at,
            [loss.loss for loss in contexts],
            yerr=2 * np.sqrt(squares),
            color=COLOURS[0],
            marker="o",
            capsize=2,
        )
        stop = where_it_stops(list(contexts))
        if stop is not None:
            axes.axvline(stop, color=COLOURS[1], linestyle="--")
            axes.set_title(f"stops to fall at {stop:,} tokens", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [_short(context) for context in at])
        axes.set(xlabel="context, tokens", ylabel="held-out loss, nats a token")
    return figure


def energy_figure(places: Sequence[Place], conditions: Sequence[Condition]) -> Figure:
    """Mean energy of an eigenstate by layer and scale, and how near to the bound of
    theorem 4 it came."""
    at = np.arange(len(places))
    with styled():
        figure = new_figure(max(5.5, 0.36 * len(places) + 1), 4)
        energy, bound = figure.subplots(2, 1, sharex=True)
        energy.bar(at, [c.energy for c in conditions], color=COLOURS[0], width=0.6)
        energy.set_ylabel("mean energy")
        bound.bar(at, [c.bound_ratio for c in conditions], color=COLOURS[2], width=0.6)
        bound.axhline(1, color=COLOURS[1], linestyle="--")
        bound.set_ylabel("largest / bound")
        bound.set_xticks(at, [place_label(place, places) for place in places])
    return figure


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def finite(value: float) -> str:
    """A figure in a table."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

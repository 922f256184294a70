"""Figures of eigenvalues and of memory, for pages and for TensorBoard.

All are of matplotlib (extra `analysis`) and need no display. What is not of a scale is drawn
in `INK`, which :func:`ten_dist.analysis.page.svg_of` lets follow the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from ten_dist.analysis.places import Place
from ten_dist.analysis.spectrum import Spectrum
from ten_dist.analysis.usage import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#767676"
"""Of axes and of text: readable on white and on black."""
COLOURS = ("#2b8cc4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""By Okabe and Ito, told apart by everybody; the blue is lighter, for black paper."""
MARKERS = "os^Dvp"
_MOST_POINTS = 4000
"""In a figure as vectors; more of them become an image in it."""


_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "ten_dist",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        ),
        INK,
    ),
}


def styled() -> AbstractContextManager[object]:
    """The settings of matplotlib under which figures are made and saved."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def eigenvalue_figure(
    places: Sequence[Place],
    spectra: Sequence[Spectrum],
    plane_counts: Sequence[np.ndarray] | None = None,
) -> Figure:
    """Base eigenvalues in the complex plane, a panel for each layer.

    Args:
        places, spectra: P of them.
        plane_counts: of each place the [64, 64] counts of
            :class:`ten_dist.analysis.usage.Usage`, shown as shades: where the effective
            eigenvalues are.
    """
    layers = sorted({place.layer for place in places})
    columns = len(layers) if len(layers) <= 3 else 2 if len(layers) == 4 else 3
    rows = math.ceil(len(layers) / columns)
    points = sum(spectrum.alpha.size for spectrum in spectra)
    with styled():
        figure = new_figure(2.4 * columns, 2.6 * rows + 0.5)
        for number, layer in enumerate(layers, start=1):
            axes = figure.add_subplot(rows, columns, number)
            of_layer = [i for i, place in enumerate(places) if place.layer == layer]
            _draw_plane(axes, f"layer {layer}")
            if plane_counts is not None:
                _draw_density(axes, np.sum([plane_counts[i] for i in of_layer], axis=0))
            for i in of_layer:
                _draw_eigenvalues(axes, places[i], spectra[i], points > _MOST_POINTS)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 * columns - 1
        )
    return figure


def _draw_plane(axes: Axes, title: str) -> None:
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    axes.plot(circle.real, circle.imag, color=INK, linewidth=0.8)
    axes.set_title(title)
    axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def _draw_density(axes: Axes, counts: np.ndarray) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", [(*_GREY, 0.0), (*_GREY, 0.9)])
    axes.imshow(
        np.log1p(counts), cmap=shades, origin="lower", extent=(-1, 1, -1, 1), zorder=0
    )


_GREY = (0.46, 0.46, 0.46)


def _draw_eigenvalues(
    axes: Axes, place: Place, spectrum: Spectrum, as_image: bool
) -> None:
    style = _scale_style(place.scale)
    for values, colour, label in (
        (spectrum.initial, "none", "initial"),
        (spectrum.now, style["color"], f"scale {place.scale}, now"),
    ):
        axes.scatter(
            values.real,
            values.imag,
            s=9 if colour != "none" else 14,
            marker=style["marker"] if colour != "none" else "o",
            facecolors=colour,
            edgecolors=INK if colour == "none" else "none",
            linewidths=0.6,
            label=label if colour != "none" or place.scale == 1 else None,
            rasterized=as_image,
            # Inside the circle anyway; it would double what a mark takes.
            clip_on=False,
        )


def _scale_style(scale: int) -> dict[str, Any]:
    number = round(math.log2(scale)) % len(COLOURS)
    return {"color": COLOURS[number], "marker": MARKERS[number]}


def memory_figure(
    places: Sequence[Place],
    spectra: Sequence[Spectrum],
    used: Sequence[np.ndarray] | None = None,
) -> Figure:
    """Memory by layer and scale in tokens: the median, and from the 5th to the 95th
    percentile.

    Args:
        places, spectra: P of them; percentiles of initial values and of those now are over
            the eigenstates.
        used: of each place the three percentiles [3] over eigenstates and steps.
    """
    series = [
        (
            "initial",
            INK,
            [np.percentile(s.initial_memory, PERCENTILES) for s in spectra],
        ),
        ("now", COLOURS[0], [np.percentile(s.memory, PERCENTILES) for s in spectra]),
    ]
    if used is not None:
        series.append(("as used", COLOURS[1], [np.asarray(u) for u in used]))
    with styled():
        figure = new_figure(max(5.5, 0.36 * len(places) + 1), 3.2)
        axes = figure.add_subplot()
        at = np.arange(len(places))
        for number, (label, colour, percentiles) in enumerate(series):
            low, middle, high = np.transpose(percentiles)
            x = at + 0.22 * (number - (len(series) - 1) / 2)
            axes.vlines(x, low, high, color=colour, linewidth=3, alpha=0.6)
            axes.scatter(x, middle, color=colour, s=16, label=label, zorder=3)
        axes.set_yscale("log")
        axes.set_ylabel("memory, tokens")
        axes.set_xticks(at, [place_label(place, places) for place in places])
        figure.legend(loc="outside upper right", ncols=3)
    return figure


def place_label(place: Place, places: Sequence[Place]) -> str:
    """A place below an axis: its layer, and its scale where there are several."""
    several = len({other.scale for other in places}) > 1
    return f"{place.layer}\n×{place.scale}" if several else str(place.layer)

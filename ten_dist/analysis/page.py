"""An analysis as one page of HTML that needs nothing else: pictures are SVG inside it.

Pictures are made by matplotlib and the page by Jinja2 (extra `analysis`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ten_dist.analysis.analysis import Analysis
from ten_dist.analysis.charts import (
    context_figure,
    energy_figure,
    finite,
    influence_figure,
    worth_figure,
)
from ten_dist.analysis.context_length import where_it_stops
from ten_dist.analysis.figures import INK, eigenvalue_figure, memory_figure, styled
from ten_dist.analysis.usage import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page_of(
    analysis: Analysis, title: str, about: str, decode: Callable[[Sequence[int]], str]
) -> str:
    """The page.

    Args:
        analysis: what it shows.
        title: name of the run.
        about: a line below it, such as the checkpoint and the data.
        decode: the text of token ids.
    """
    from jinja2 import Environment

    source = (
        resources.files("ten_dist.analysis").joinpath("page.html").read_text("utf-8")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=title,
        about=about,
        analysis=analysis,
        figures={name: svg_of(make()) for name, make in _figures(analysis).items()},
        scales=_scale_rows(analysis),
        condition=_condition_rows(analysis),
        gradients=_gradient_rows(analysis),
        half=analysis.influence.lag_of_share(0.5),
        nine_tenths=analysis.influence.lag_of_share(0.9),
        stop=where_it_stops(analysis.contexts),
        text=_for_script(_text(analysis, decode)),
    )


def svg_of(figure: Figure) -> Markup:
    """A figure as an element of a page, whose axes have the colour of the page's text."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def _figures(analysis: Analysis) -> dict[str, Callable[[], Figure]]:
    places, spectra = analysis.places, analysis.spectra
    planes = [usage.plane_counts for usage in analysis.usages]
    used = [usage.memory_of_all(PERCENTILES) for usage in analysis.usages]
    figures: dict[str, Callable[[], Figure]] = {
        "eigenvalues": lambda: eigenvalue_figure(places, spectra, planes),
        "memory": lambda: memory_figure(places, spectra, used),
        "influence": lambda: influence_figure(analysis.influence),
        "worth": lambda: worth_figure(analysis.worth),
        "energy": lambda: energy_figure(places, analysis.conditions),
    }
    if analysis.contexts:
        figures["context"] = lambda: context_figure(analysis.contexts)
    return figures


def _scale_rows(analysis: Analysis) -> list[list[str]]:
    """Of each scale of a hierarchy, or level: its name, eigenstates, worth, memory as used."""
    rows = []
    levels = analysis.worth.get("level", [])
    for part in analysis.worth.get("scale", levels):
        medians = [
            usage.memory_of_all((50,))[0]
            for place, usage in zip(analysis.places, analysis.usages)
            if levels or part.part == f"scale {place.scale}"
        ]
        spread = f"{finite(min(medians))} to {finite(max(medians))}"
        rise = f"{part.rise:.4f} ± {finite(2 * part.standard_error)}"
        rows.append([part.part, f"{part.eigenstates:,}", rise, spread])
    return rows


def _condition_rows(analysis: Analysis) -> list[list[str]]:
    rows = []
    for place, found in zip(analysis.places, analysis.conditions):
        counts = (found.dead, found.forgets, found.holds)
        shares = (
            found.decay_at_limit,
            found.rotation_at_limit,
            found.open_gates,
            found.shut_gates,
        )
        rows.append(
            [
                str(place),
                finite(found.energy),
                finite(found.bound_ratio),
                *(f"{int(flags.sum())} of {flags.size}" for flags in counts),
                *(f"{100 * share:.1f} %" for share in shares),
            ]
        )
    return rows


def _gradient_rows(analysis: Analysis) -> list[list[str]]:
    groups = list(
        dict.fromkeys(g for norms in analysis.gradient_norms.values() for g in norms)
    )
    rows = [["", *groups]]
    for layer, norms in analysis.gradient_norms.items():
        rows.append([layer, *(finite(norms[g]) if g in norms else "" for g in groups)])
    return rows


def _text(analysis: Analysis, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """What the script of the page colours and lists."""
    writing = analysis.writing
    return {
        "tokens": [decode([token]) for token in writing.tokens.tolist()],
        "places": [str(place) for place in analysis.places],
        "written": _rounded(writing.written),
        "erased": _rounded(writing.erased),
        "movers": writing.movers.tolist(),
        "changes": _rounded(writing.changes),
    }


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    return [
        [float(f"{value:.3g}") if np.isfinite(value) else None for value in row]
        for row in values.tolist()
    ]


def _for_script(value: Any) -> Markup:
    """JSON inside a script element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))

"""All that is found out about a network, and its form in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ten_dist.analysis.condition import Condition, condition_of, gradient_norms
from ten_dist.analysis.context_length import (
    ContextLoss,
    measure_context,
    where_it_stops,
)
from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.influence import Influence, measure_influence
from ten_dist.analysis.places import Place, places_of
from ten_dist.analysis.spectrum import Spectrum, spectrum_of
from ten_dist.analysis.usage import PERCENTILES, Usage, observe_usage
from ten_dist.analysis.worth import Worth, measure_worth, row_losses
from ten_dist.analysis.writing import Writing, measure_writing
from ten_dist.data import Manifest
from ten_dist.errors import ConfigurationError
from ten_dist.model import TemporalEigenstateNetwork

_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was found out about a network; lists by place are in the order of `places`."""

    places: list[Place]
    spectra: list[Spectrum]
    usages: list[Usage]
    conditions: list[Condition]
    influence: Influence
    writing: Writing
    loss: float
    """Held-out, nats a token, over the rows."""
    worth: dict[str, list[Worth]]
    """As :func:`measure_worth`."""
    contexts: list[ContextLoss]
    gradient_norms: dict[str, dict[str, float]]
    """As :func:`gradient_norms`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is not finite is None."""
        return _plain(
            {
                "places": [self._place(number) for number in range(len(self.places))],
                "influence": {
                    "by_lag": self.influence.by_lag,
                    "half": self.influence.lag_of_share(0.5),
                    "nine_tenths": self.influence.lag_of_share(0.9),
                },
                "text": dataclasses.asdict(self.writing),
                "loss": self.loss,
                "worth": {
                    kind: [dataclasses.asdict(part) for part in parts]
                    for kind, parts in self.worth.items()
                },
                "context": {
                    "losses": [dataclasses.asdict(loss) for loss in self.contexts],
                    "stops_at": where_it_stops(self.contexts),
                },
                "gradient_norms": self.gradient_norms,
            }
        )

    def _place(self, number: int) -> dict[str, Any]:
        place, spectrum = self.places[number], self.spectra[number]
        usage, condition = self.usages[number], self.conditions[number]
        used = usage.memory_percentiles(PERCENTILES)
        return {
            "layer": place.layer,
            "scale": place.scale,
            "initial_alpha": spectrum.initial_alpha,
            "initial_omega": spectrum.initial_omega,
            "alpha": spectrum.alpha,
            "omega": spectrum.omega,
            "initial_memory": spectrum.initial_memory,
            "memory": spectrum.memory,
            "used_memory": dict(zip(map(str, PERCENTILES), used.T)),
            "used_memory_of_all": usage.memory_of_all(PERCENTILES),
            "plane_counts": usage.plane_counts,
            "energy_by_eigenstate": usage.energy,
            **dataclasses.asdict(condition),
        }


def analyze(
    network: TemporalEigenstateNetwork,
    manifest: Manifest,
    seq_len: int,
    *,
    rows: int = 32,
    context_tokens: int = 32768,
    text: Sequence[int] | None = None,
    text_tokens: int = 256,
    progress: Callable[[str], None] = lambda question: None,
) -> Analysis:
    """Find out what a network has learned.

    Args:
        network: in float32 and in evaluation mode; it is left as it was.
        manifest: of a held-out token set.
        seq_len: tokens of a row.
        rows: held-out rows to look at.
        context_tokens: to read for each length of context.
        text: token ids to look at one by one; by default the start of the first row.
        text_tokens: how many of them.
        progress: told what is worked on next.

    Raises:
        ConfigurationError: the network has no eigenstates, or its loss is not finite.
        DataError: the set has not one row, or is damaged.
    """
    places = places_of(network)
    device = network.embedding.weight.device
    held_out = HeldOutRows.read(manifest, seq_len, rows, device)
    progress("loss")
    loss = float(row_losses(network, held_out).mean())
    if not math.isfinite(loss):
        raise ConfigurationError(
            "the held-out loss of the checkpoint is not finite, so that nothing can be said "
            "of it: choose an earlier one with --checkpoint"
        )
    progress("eigenvalues")
    usages = observe_usage(network, held_out)
    progress("influence")
    influence = measure_influence(network, held_out)
    progress("text")
    tokens = held_out.inputs[0].tolist() if text is None else text
    writing = measure_writing(network, tokens[:text_tokens])
    progress("worth")
    worth = measure_worth(network, held_out)
    progress("context")
    contexts = measure_context(network, manifest, context_tokens)
    progress("gradients")
    return Analysis(
        places=places,
        spectra=[spectrum_of(place) for place in places],
        usages=usages,
        conditions=[condition_of(*pair) for pair in zip(places, usages)],
        influence=influence,
        writing=writing,
        loss=loss,
        worth=worth,
        contexts=contexts,
        gradient_norms=gradient_norms(network, held_out),
    )


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts of arrays and floats, to some digits."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value

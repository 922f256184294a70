"""What parts of a network are worth: the held-out loss without them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.places import Place, as_array, places_of
from ten_dist.analysis.spectrum import spectrum_of
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.eigenstate_module import EigenstateModule

BAND_EDGES = (1, 4, 16, 64, 256, 1024, 4096, math.inf)
"""Edges of the bands of time scales, in tokens."""

Silence = Mapping[EigenstateModule, Tensor]
"""Of some mixers the eigenstates to silence, [K] bool."""


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a part of a network is worth."""

    part: str
    """Such as "layer 3", "scale 4" or "4 to 16 tokens"."""
    eigenstates: int
    """How many it has."""
    rise: float
    """Of the mean held-out loss without it, nats a token."""
    standard_error: float
    """Of the rise, as far as it comes from which rows were drawn."""


@contextlib.contextmanager
def silenced(parts: Silence) -> Iterator[None]:
    """Keep some eigenstates at zero in a block: nothing is written to them.

    A mixer all of whose eigenstates are silenced gives zeros. After the block the weights
    are what they were, to the bit.
    """
    saved = []
    with torch.no_grad():
        for mixer, eigenstates in parts.items():
            rows = eigenstates.repeat(2).nonzero().squeeze(1)
            saved.append((mixer.input_weight, rows, mixer.input_weight[rows]))
            mixer.input_weight[rows] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, rows, values in saved:
                weight[rows] = values


@torch.no_grad()
def row_losses(network: TemporalEigenstateNetwork, rows: HeldOutRows) -> np.ndarray:
    """[R] float64 mean cross-entropy of each row, nats a token."""
    losses = [
        network.compute_loss(batch.inputs, batch.targets)["row_losses"]
        for batch in rows.batches()
    ]
    return as_array(torch.cat(losses).double())


def measure_worth(
    network: TemporalEigenstateNetwork, rows: HeldOutRows
) -> dict[str, list[Worth]]:
    """The worth of parts that are silenced one at a time, on the same rows.

    Returns:
        By kind of part: "layer" (the mixer of each layer), "scale" (in all layers, for a
        network that has several) and "band" (of base memory, in all layers and scales).
    """
    whole = row_losses(network, rows)

    def worth(part: str, silence: Silence) -> Worth:
        with silenced(silence):
            rises = row_losses(network, rows) - whole
        error = (
            rises.std(ddof=1) / math.sqrt(rises.size) if rises.size > 1 else math.nan
        )
        count = sum(int(eigenstates.sum()) for eigenstates in silence.values())
        return Worth(part, count, float(rises.mean()), float(error))

    return {
        kind: [worth(name, silence) for name, silence in parts.items()]
        for kind, parts in _parts(places_of(network)).items()
    }


def _parts(places: list[Place]) -> dict[str, dict[str, Silence]]:
    layers: dict[str, dict[EigenstateModule, Tensor]] = {}
    scales: dict[str, dict[EigenstateModule, Tensor]] = {}
    for place in places:
        everything = torch.ones_like(place.mixer.alpha_base, dtype=torch.bool)
        layers.setdefault(f"layer {place.layer}", {})[place.mixer] = everything
        scales.setdefault(f"scale {place.scale}", {})[place.mixer] = everything
    parts: dict[str, dict[str, Silence]] = {"layer": {**layers}}
    if len(scales) > 1:
        parts["scale"] = {**scales}
    parts["band"] = _bands(places)
    return parts


def _bands(places: list[Place]) -> dict[str, Silence]:
    bands: dict[str, Silence] = {}
    for low, high in itertools.pairwise(BAND_EDGES):
        silence = {}
        for place in places:
            memory = spectrum_of(place).memory
            inside = torch.from_numpy((low <= memory) & (memory < high))
            silence[place.mixer] = inside.to(place.mixer.alpha_base.device)
        if any(bool(inside.any()) for inside in silence.values()):
            end = f"to {high} tokens" if high < math.inf else "tokens and more"
            bands[f"{low} {end}"] = silence
    return bands

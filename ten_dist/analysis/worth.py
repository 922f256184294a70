"""What parts of a network are worth: the held-out loss without them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.places import Place, as_array, places_of
from ten_dist.analysis.spectrum import spectrum_of
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.eigenstate_module import EigenstateModule
from ten_dist.model.mixer import EigenstateMixer

BAND_EDGES = (1, 4, 16, 64, 256, 1024, 4096, math.inf)
"""Edges of the bands of time scales, in tokens."""

Silence = Mapping[EigenstateModule, Tensor]
"""Of some mixers the eigenstates to silence, [K] bool."""


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a part of a network is worth."""

    part: str
    """Such as "layer 3", "scale 4", "level 4" or "4 to 16 tokens"."""
    eigenstates: int
    """How many it has; of a level those that it is read of, which are all."""
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
    rows_of_beta = [
        (mixer.input_weight, eigenstates.repeat(2), 0.0)
        for mixer, eigenstates in parts.items()
    ]
    with _replaced(rows_of_beta):
        yield


@contextlib.contextmanager
def without_level(network: TemporalEigenstateNetwork, level: int) -> Iterator[None]:
    """Read nothing of one level in all layers in a block: its weights mu are 0."""
    changes = []
    for place in places_of(network):
        if not isinstance(place.mixer, EigenstateMixer):
            continue  # A matrix layer reads all of the past alike.
        levels = place.mixer.levels
        assert levels is not None, "a network with levels"
        of_heads = torch.arange(len(levels.bias), device=levels.bias.device)
        rows = of_heads // levels.num_heads == level
        changes += [(levels.weight, rows, 0.0), (levels.bias, rows, -math.inf)]
    with _replaced(changes):
        yield


@contextlib.contextmanager
def _replaced(changes: Iterable[tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Give rows of weights, [R] bool, one value in a block, and then those that they had."""
    saved = []
    with torch.no_grad():
        for weight, of_all, value in changes:
            rows = of_all.nonzero().squeeze(1)
            saved.append((weight, rows, weight[rows]))
            weight[rows] = value
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
        By kind of part: "layer" (the mixer of each layer), "scale" or "level" (in all
        layers, for a network that has several) and "band" (of base memory, in all layers
        and scales).
    """
    whole = row_losses(network, rows)

    def worth(
        part: str, count: int, silence: contextlib.AbstractContextManager
    ) -> Worth:
        with silence:
            rises = row_losses(network, rows) - whole
        error = (
            rises.std(ddof=1) / math.sqrt(rises.size) if rises.size > 1 else math.nan
        )
        return Worth(part, count, float(rises.mean()), float(error))

    def worth_of_eigenstates(part: str, silence: Silence) -> Worth:
        count = sum(int(eigenstates.sum()) for eigenstates in silence.values())
        return worth(part, count, silenced(silence))

    config = network.config
    found = {
        kind: [worth_of_eigenstates(name, silence) for name, silence in parts.items()]
        for kind, parts in _parts(places_of(network)).items()
    }
    if config.levels is not None:
        count = config.n_layers * config.num_eigenstates
        found["level"] = [
            worth(name, count, without_level(network, level))
            for level, name in enumerate(level_names(config.levels))
        ]
    return found


def level_names(lengths: Sequence[int]) -> list[str]:
    """Those of the levels with blocks of some lengths, and of the last one."""
    return [*(f"level {length}" for length in lengths), f"beyond {lengths[-1]}"]


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

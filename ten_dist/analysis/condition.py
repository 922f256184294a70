"""Whether eigenstates, selection, gates and gradients are in a sound condition."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.places import Place, as_array
from ten_dist.analysis.usage import Usage
from ten_dist.config.model import IGNORED_TARGET
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.eigenstate_module import EigenstateModule

DEAD = 0.01
"""Part of the mean output of a place below which an eigenstate is dead."""
FORGETS, HOLDS = 1.1, 10_000.0
"""Memory, in steps, below or above which an eigenstate is saturated if it stays there at
95 % of the steps."""
OPEN, SHUT = 0.95, 0.01
"""Values above or below which a gate is always open or shut if it stays there at all steps."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """Of the K eigenstates and G gates of a place."""

    energy: float
    """Mean of |c_k|^2 over eigenstates and steps."""
    bound_ratio: float
    """Largest sqrt(E(t)) beside the bound of theorem 4; above 1 is a fault."""
    dead: np.ndarray
    """[K] bool: what the eigenstate adds to the output, the root of its mean square, is below
    1 % of the mean of its place."""
    forgets: np.ndarray
    """[K] bool: memory below 1.1 steps at 95 % of the steps, so that nothing is kept."""
    holds: np.ndarray
    """[K] bool: memory above 10,000 steps at 95 % of the steps, so that nothing is forgotten."""
    decay_at_limit: float
    """Share of eigenstates and steps whose decay is selected as far as it can be."""
    rotation_at_limit: float
    """The same of the rotation."""
    open_gates: float
    """Share of gates above 0.95 at all steps."""
    shut_gates: float
    """Share of gates below 0.01 at all steps."""


@torch.no_grad()
def condition_of(place: Place, usage: Usage) -> Condition:
    """The condition of a place, from what was seen of it."""
    sizes = as_array(place.mixer.read_sizes())
    outputs = sizes * np.sqrt(usage.energy)
    memory = usage.memory_percentiles((5, 95)) / usage.scale
    return Condition(
        energy=float(usage.energy.mean()),
        bound_ratio=usage.bound.largest_ratio,
        dead=outputs <= DEAD * outputs.mean(),
        forgets=memory[:, 1] < FORGETS,
        holds=memory[:, 0] > HOLDS,
        decay_at_limit=usage.decay_at_limit,
        rotation_at_limit=usage.rotation_at_limit,
        open_gates=float((usage.lowest_gate > OPEN).mean()),
        shut_gates=float((usage.highest_gate < SHUT).mean()),
    )


def gradient_norms(
    network: TemporalEigenstateNetwork, rows: HeldOutRows
) -> dict[str, dict[str, float]]:
    """Norms of the gradient of the training loss on some rows, by group of parameters.

    Returns:
        By "embedding", "layer 1" and so on, "final norm"; of each, by group: "input",
        "selection" and "gate" (the rows of W_in, W_sel, W_g and its bias), of matrix layers
        "query" and "value", where "input" are keys, "output",
        "eigenvalues" (alpha and omega), "range" (s_a and s_w), "coupling", "scales" (W_s),
        "levels" (W_mu and its bias), "MLP", "norm", "convolution"; of a matrix layer also
        "query" and "value". A group that a network has not is left out.
    """
    squares: dict[str, dict[str, float]] = {}
    for name, gradient in _gradients(network, rows):
        layer, parts = _groups(network, name, gradient)
        of_layer = squares.setdefault(layer, {})
        for group, part in parts.items():
            square = part.double().square().sum().item()
            of_layer[group] = of_layer.get(group, 0.0) + square
    return {
        layer: {group: square**0.5 for group, square in groups.items()}
        for layer, groups in squares.items()
    }


@torch.enable_grad()
def _gradients(
    network: TemporalEigenstateNetwork, rows: HeldOutRows
) -> Iterator[tuple[str, Tensor]]:
    names, parameters = zip(*network.named_parameters())
    counted = (rows.targets != IGNORED_TARGET).sum()
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in rows.batches():
        share = (batch.targets != IGNORED_TARGET).sum() / counted
        loss = network.compute_loss(batch.inputs, batch.targets)["loss"] * share
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(totals, found):
            if gradient is not None:
                total += gradient
    yield from zip(names, totals)


def _groups(
    network: TemporalEigenstateNetwork, name: str, gradient: Tensor
) -> tuple[str, dict[str, Tensor]]:
    """The layer of a parameter, and its gradient by group."""
    path, _, own = name.rpartition(".")
    if not path.startswith("blocks."):
        layer = path.replace("_", " ")
        return layer, {"norm" if "norm" in path else "embedding": gradient}
    _, number, part = f"{path}.".split(".", 2)
    layer = f"layer {int(number) + 1}"
    if part.startswith("feed_forward."):
        return layer, {"MLP": gradient}
    if "norm" in part:
        return layer, {"norm": gradient}
    if part.startswith("convolution"):
        return layer, {"convolution": gradient}
    if path.endswith(".levels"):
        return layer, {"levels": gradient}
    if own == "input_weight":
        mixer = network.get_submodule(path)
        assert isinstance(mixer, EigenstateModule)
        names = mixer.projections
        return layer, {name: gradient[mixer.rows_of(name)] for name in names}
    return layer, {_GROUPS[own]: gradient}


_GROUPS = {
    "gate_bias": "gate",
    "output_weight": "output",
    "alpha_offset": "eigenvalues",
    "omega_offset": "eigenvalues",
    "selection": "range",
    "coupling": "coupling",
    "coupling_strength": "coupling",
    "weight": "scales",
}

"""The parameters of a model as ZeRO sees them, from its configuration alone."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model import TemporalEigenstateNetwork


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter; the tied weight is there once."""

    name: str
    elements: int
    decayed: bool
    """Whether it takes weight decay, which decides its group in the optimizer."""


@functools.lru_cache(maxsize=64)
def parameters_of(config: TemporalEigenstateConfig) -> tuple[Parameter, ...]:
    """All parameters, in the order in which optimizer groups have them."""
    model = meta_model(config)
    exempt = set(model.parameters_without_weight_decay())
    return tuple(
        Parameter(name, parameter.numel(), name not in exempt)
        for name, parameter in model.named_parameters()
    )


def meta_model(config: TemporalEigenstateConfig) -> TemporalEigenstateNetwork:
    """The network without any values."""
    with torch.device("meta"):
        return TemporalEigenstateNetwork(config)


def count(parameters: tuple[Parameter, ...]) -> int:
    """Elements of all of them together."""
    return sum(parameter.elements for parameter in parameters)


def touched_elements(parameters: tuple[Parameter, ...], ranks: int) -> int:
    """Elements of the parameters, whole, that reach into the partition of one rank.

    At stages 1 and 2 the parameters of a group lie one behind the other, and each rank
    has an equal range. DeepSpeed copies the gradient of every parameter in it whole.

    Returns:
        That of the rank that has the most.
    """
    totals = [0] * ranks
    for decayed in (True, False):
        group = [p.elements for p in parameters if p.decayed is decayed]
        share = math.ceil(sum(group) / ranks)
        start = 0
        for elements in group:
            for rank in range(start // share, (start + elements - 1) // share + 1):
                totals[rank] += elements
            start += elements
    return max(totals)

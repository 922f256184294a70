"""Where the eigenstates of a network are: a mixer for each layer and scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ten_dist.errors import ConfigurationError
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.eigenstate_module import EigenstateModule


class Place(NamedTuple):
    """One scale of one layer, with K eigenstates."""

    layer: int
    """From 1, as people count."""
    scale: int
    """Tokens a step; 1 in a TEN."""
    mixer: EigenstateModule

    def __str__(self) -> str:
        return f"layer {self.layer}, scale {self.scale}"


def places_of(network: TemporalEigenstateNetwork) -> list[Place]:
    """All places, in the order in which a network runs their scans.

    Raises:
        ConfigurationError: the network has attention in the place of eigenstates.
    """
    if network.config.mixer == "attention":
        raise ConfigurationError(
            "the model has attention in the place of eigenstates (--mixer attention), and "
            "everything that is analysed is about eigenstates: name another run"
        )
    return list(_places(network))


def _places(network: TemporalEigenstateNetwork) -> Iterator[Place]:
    for name, module in network.named_modules():
        if isinstance(module, EigenstateModule):
            # blocks.LAYER.mixer, or blocks.LAYER.mixer.scales.NUMBER.ten
            yield Place(int(name.split(".")[1]) + 1, module.step, module)


def as_array(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor in NumPy, in its dtype."""
    return tensor.detach().cpu().numpy().copy()

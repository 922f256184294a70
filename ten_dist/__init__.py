"""Distributed training of Temporal Eigenstate Networks (TEN and HTEN)."""

from typing import TYPE_CHECKING

from ten_dist.config.model import PRESETS, TemporalEigenstateConfig

if TYPE_CHECKING:
    from ten_dist.model import TemporalEigenstateNetwork

__version__ = "0.1.0"

__all__ = ["PRESETS", "TemporalEigenstateConfig", "TemporalEigenstateNetwork"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import, and what only starts or watches processes needs none.
    if name == "TemporalEigenstateNetwork":
        from ten_dist.model import TemporalEigenstateNetwork

        return TemporalEigenstateNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

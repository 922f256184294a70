"""Distributed training of Temporal Eigenstate Networks (TEN and HTEN)."""

from ten_dist.config import PRESETS, TemporalEigenstateConfig
from ten_dist.model import TemporalEigenstateNetwork

__version__ = "0.1.0"

__all__ = ["PRESETS", "TemporalEigenstateConfig", "TemporalEigenstateNetwork"]

"""Models that TEN is compared with: a transformer, minGRU, Mamba-2 and gated delta net."""

from benchmarks.baselines.network import Baseline, BaselineConfig

__all__ = ["Baseline", "BaselineConfig"]

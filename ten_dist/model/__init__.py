"""Mixer, hierarchy (HTEN), block, network and loss."""

from ten_dist.model.network import NetworkState, TemporalEigenstateNetwork

__all__ = ["NetworkState", "TemporalEigenstateNetwork"]

"""Mixer, hierarchy (HTEN), block, network, loss and sampling."""

from ten_dist.model.network import NetworkState, TemporalEigenstateNetwork

__all__ = ["NetworkState", "TemporalEigenstateNetwork"]

"""How long collectives take: rings over links of two kinds, in a node and between nodes.

In a ring of N ranks each sends (N-1)/N of the data to its neighbour to gather or to
scatter it, and twice that to reduce it to all. In a node that goes over its own links.
Over several nodes a ring enters and leaves each of them once: as many rings as there are
network cards share the data, so that all cards of a node carry it once. The slower of the
two sorts of links sets the pace. Latency counts a step of the ring in a node for every GPU of a node, and one between
nodes for every node: hierarchical rings, as NCCL builds them.
"""

from __future__ import annotations

import dataclasses

from ten_dist.planning.communication import ALL_REDUCE, Collective


@dataclasses.dataclass(frozen=True)
class Topology:
    """Nodes of GPUs, and the links that join them."""

    nodes: int
    gpus_per_node: int
    node_bandwidth: float
    """Bytes a second, one way, from a GPU to its node."""
    network_bandwidth: float
    """Bytes a second, one way, from a node to the others, over all of its cards."""
    node_latency: float = 3e-6
    """Seconds of a step of a ring in a node."""
    network_latency: float = 10e-6
    """Seconds of a step of a ring between nodes."""

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a ring over all ranks runs at."""
        if self.nodes == 1:
            return self.node_bandwidth
        if self.gpus_per_node == 1:
            return self.network_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth)

    def seconds(self, collective: Collective) -> float:
        """Time of a collective."""
        rounds = 2 if collective.kind == ALL_REDUCE else 1
        volume = rounds * (self.ranks - 1) / self.ranks * collective.bytes
        steps = (self.gpus_per_node - 1) * self.node_latency
        steps += (self.nodes - 1) * self.network_latency
        return volume / self.bandwidth + rounds * collective.calls * steps

"""What the ranks send each other in an optimizer step, and how long that takes.

Collectives are rings over links of two kinds, in a node and between nodes.
In a ring of N ranks each sends (N-1)/N of the data to its neighbour to gather or to
scatter it, and twice that to reduce it to all. In a node that goes over its own links.
Over several nodes a ring enters and leaves each of them once: as many rings as there are
network cards share the data, so that all cards of a node carry it once. The slower of the
two sorts of links sets the pace. Latency counts a step of the ring in a node for every GPU
of a node, and one between nodes for every node: hierarchical rings, as NCCL builds them.

DeepSpeed 0.19 sends this with the settings of ds_configs/: everything in the precision of
the parameters (float32, but with `bf16_params`), nothing beside the computation
(`overlap_comm` is off).

    stage 0   all gradients reduced to every rank, once a step
    stage 1   the same, then the updated weights gathered
    stage 2   the same, but gradients are reduced in every micro-batch
    stage 3   weights gathered and gradients reduced to their owners in every micro-batch

Muon adds two exchanges of its matrices at stages 1 to 3 and one at stage 0, in float32.

Stages 1 and 2 reduce to every rank, too, although each needs its own part alone
(`use_multi_rank_bucket_allreduce`).
"""

from __future__ import annotations

import dataclasses
import math

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.memory import Precision
from ten_dist.planning.sharding import (
    Sharding,
    Workload,
    count,
    gathered_again,
    matrices_of,
    parameters_of,
    rounds_of_muon,
)


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

    def seconds(self, collective: Collective) -> float:
        """Time of a collective."""
        rounds = 2 if collective.kind == ALL_REDUCE else 1
        volume = rounds * (self.ranks - 1) / self.ranks * collective.bytes
        steps = (self.gpus_per_node - 1) * self.node_latency
        steps += (self.nodes - 1) * self.network_latency
        links = [self.node_bandwidth] if self.gpus_per_node > 1 else []
        links += [self.network_bandwidth] if self.nodes > 1 else []
        slowest = min(links, default=math.inf)
        return volume / slowest + rounds * collective.calls * steps


ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"
ALL_TO_ALL = "all_to_all"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective in one step."""

    kind: str
    what: str
    """Is sent, in words."""
    bytes: float
    """Of the whole: of what is reduced, or of what all ranks have gathered; of an
    all-to-all, from one rank to all."""
    calls: int
    """In which it is sent."""


def collectives_of_step(
    config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
) -> list[Collective]:
    """The collectives of one step; none with one rank."""
    if sharding.ranks == 1:
        return []
    parameters = parameters_of(config)
    elements, low = count(parameters), Precision.of(work.precision).parameters
    micro_steps = work.accumulation_steps

    def collective(kind: str, what: str, sent: float, times: int) -> Collective:
        calls = times * math.ceil(sent / sharding.bucket)
        return Collective(kind, what, low * sent * times, calls)

    if sharding.stage == 3:
        again = gathered_again(config, sharding)
        return [
            collective(ALL_GATHER, "weights", elements + again, micro_steps),
            collective(REDUCE_SCATTER, "gradients", elements, micro_steps),
            *_exchanges_of_muon(config, sharding, work),
        ]
    reductions = micro_steps if sharding.stage == 2 else 1
    sent = [collective(ALL_REDUCE, "gradients", elements, reductions)]
    sent += _exchanges_of_muon(config, sharding, work)
    if sharding.stage > 0:
        sent.append(collective(ALL_GATHER, "weights", elements, 1))
    return sent


def _exchanges_of_muon(
    config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
) -> list[Collective]:
    """Matrices to their owners and back, in float32; at stage 0 from them to all."""
    if work.optimizer != "muon":
        return []
    matrices, ranks = matrices_of(config), sharding.ranks
    elements, calls = (
        sum(m.elements for m in matrices),
        len(rounds_of_muon(config, ranks)),
    )
    if not sharding.stage:
        return [Collective(ALL_TO_ALL, "orthogonal matrices", 4.0 * elements, calls)]
    there_and_back = 2 * 4.0 * elements / ranks
    return [Collective(ALL_TO_ALL, "matrices", there_and_back, 2 * calls)]

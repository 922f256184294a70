"""The same run on 1 to 1024 GPUs: how much faster, how much dearer, and where it stops."""

from __future__ import annotations

import dataclasses

from ten_dist.planning.choice import Layout, Planner
from ten_dist.planning.topology import Topology

MOST_GPUS = 1024
LEAST_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class ScalePoint:
    """The run on one number of GPUs."""

    gpus: int
    layout: Layout | None
    """The fastest that fits, or None where none does, or the batch does not divide."""
    tokens_per_second: float
    efficiency: float
    """Tokens a second of a GPU, over those on the fewest GPUs that it fits on."""
    reason: str = ""
    """Why there is no layout, or why it does not scale to here."""


def scale(planner: Planner, topology: Topology) -> list[ScalePoint]:
    """The run on powers of two, in nodes like those of `topology`, the batch unchanged."""
    points: list[ScalePoint] = []
    reference = None
    batch = planner.request.global_batch_size
    gpus = 1
    while gpus <= MOST_GPUS:
        reason = ""
        layout, rate, efficiency = None, 0.0, 0.0
        if gpus > batch:
            reason = f"more GPUs than the batch has rows, {batch}"
        elif batch % gpus or (
            planner.request.micro_batch_size
            and batch % (gpus * planner.request.micro_batch_size)
        ):
            reason = f"the batch of {batch} rows does not divide"
        else:
            layout = planner.best(planner.layouts(_of(topology, gpus)))
            if layout is None:
                reason = "does not fit"
            else:
                rate = planner.request.tokens_per_step / layout.time.total
                reference = reference or rate / gpus
                efficiency = rate / gpus / reference
                if efficiency < LEAST_EFFICIENCY:
                    reason = f"below {LEAST_EFFICIENCY:.0%} of the work of each GPU"
        points.append(ScalePoint(gpus, layout, rate, efficiency, reason))
        gpus *= 2
    return points


def stops_at(points: list[ScalePoint]) -> ScalePoint | None:
    """The first number of GPUs that is too many, or None where all pay."""
    started = False
    for point in points:
        started = started or point.layout is not None
        if started and point.reason:
            return point
    return None


def _of(topology: Topology, gpus: int) -> Topology:
    """As many nodes like those of `topology` as `gpus` take, or a part of one."""
    per_node = min(gpus, topology.gpus_per_node)
    return dataclasses.replace(
        topology, nodes=-(-gpus // per_node), gpus_per_node=per_node
    )

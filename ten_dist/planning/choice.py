"""Which ZeRO stage, micro-batch and checkpointing to train with: what fits, and is fastest.

The choice is made for 1 to 1024 GPUs, which shows where more of them stop to pay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.communication import Topology
from ten_dist.planning.memory import Memory, peak_memory
from ten_dist.planning.sharding import Sharding, Workload, meta_model
from ten_dist.planning.step_time import (
    Operations,
    Speeds,
    StepTime,
    count_operations,
    step_time,
)

MOST_TOKENS_AT_ONCE = 32_768
"""Of a micro-batch: products of more rows are assumed to be no faster."""

AS_FAST = 1.02
"""Times the seconds of the fastest: less says nothing, as speeds are assumed."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be trained, and what is not to be chosen."""

    configs: tuple[TemporalEigenstateConfig, ...]
    """The model, with each checkpointing that may be chosen."""
    seq_len: int
    global_batch_size: int
    precision: str
    micro_batch_size: int | None
    """Rows, or None to choose."""
    stages: tuple[tuple[str, Sharding], ...]
    """DeepSpeed configurations that may be chosen, by name; of one rank each."""
    memory_bytes: float
    """Of a GPU, for tensors."""

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.global_batch_size * self.seq_len


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to train, with its memory and its time."""

    name: str
    """Of the DeepSpeed configuration."""
    config: TemporalEigenstateConfig
    sharding: Sharding
    work: Workload
    memory: Memory
    time: StepTime
    fits: bool


class Planner:
    """Finds layouts of a request, whatever the number of GPUs."""

    def __init__(self, request: Request, speeds: Speeds) -> None:
        self.request, self.speeds = request, speeds
        self._operations: dict[str, Operations] = {
            config.gradient_checkpointing: count_operations(
                meta_model(config), request.seq_len
            )
            for config in request.configs
        }

    def operations(self, config: TemporalEigenstateConfig) -> Operations:
        """Of one of the request's configurations."""
        return self._operations[config.gradient_checkpointing]

    def layouts(self, topology: Topology) -> list[Layout]:
        """For each configuration and checkpointing the largest micro-batch that fits, or
        the smallest where none does."""
        found = []
        for name, sharding in self.request.stages:
            sharding = dataclasses.replace(sharding, ranks=topology.ranks)
            for config in self.request.configs:
                sizes = self._micro_batches(topology.ranks)
                tried = (
                    self._layout(name, config, sharding, topology, rows)
                    for rows in sizes
                )
                layout = next((one for one in tried if one.fits), None)
                if layout is None:
                    layout = self._layout(name, config, sharding, topology, sizes[-1])
                found.append(layout)
        return found

    def best(self, layouts: Sequence[Layout]) -> Layout | None:
        """The first that fits and is as fast as any, to :data:`AS_FAST`; the first shards
        least and recomputes least. None where nothing fits."""
        fitting = [layout for layout in layouts if layout.fits]
        fastest = min((layout.time.total for layout in fitting), default=0.0)
        return next(
            (one for one in fitting if one.time.total <= AS_FAST * fastest), None
        )

    def _micro_batches(self, ranks: int) -> list[int]:
        """Sizes to try, largest first."""
        request = self.request
        if request.micro_batch_size is not None:
            return [request.micro_batch_size]
        share = request.global_batch_size // ranks
        most = max(1, min(share, MOST_TOKENS_AT_ONCE // request.seq_len))
        return [rows for rows in range(most, 0, -1) if share % rows == 0]

    def _layout(
        self,
        name: str,
        config: TemporalEigenstateConfig,
        sharding: Sharding,
        topology: Topology,
        rows: int,
    ) -> Layout:
        request = self.request
        work = Workload(
            rows=rows,
            seq_len=request.seq_len,
            accumulation_steps=request.global_batch_size // (topology.ranks * rows),
            precision=request.precision,
        )
        memory = peak_memory(config, sharding, work)
        return Layout(
            name,
            config,
            sharding,
            work,
            memory,
            step_time(
                config, self.operations(config), sharding, work, topology, self.speeds
            ),
            memory.total <= request.memory_bytes,
        )


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

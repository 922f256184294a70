"""What to train with and what the run will cost: what fits a GPU and is fastest of it.

ZeRO stage, micro-batch and checkpointing are chosen, for 1 to 1024 GPUs, which shows where
more of them stop to pay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError
from ten_dist.planning.communication import Topology
from ten_dist.planning.machines import DEVICES, GIB, MachineOptions
from ten_dist.planning.memory import Memory, peak_memory
from ten_dist.planning.sharding import Sharding, Workload
from ten_dist.planning.step_time import Speeds, StepTime, step_time
from ten_dist.schedule import make_schedule

MOST_TOKENS_AT_ONCE = 32_768
"""Of a micro-batch: products of more rows are assumed to be no faster."""

AS_FAST = 1.02
"""Times the seconds of the fastest: less says nothing, as speeds are assumed."""


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


NUMBERS_OF_GPUS = tuple(2**power for power in range(11))
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
    reason: str
    """Why there is no layout, or why it does not scale to here; else empty."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run; None where its length or the price of a GPU is not known."""

    days: float | None
    """From its first step to its last."""
    dollars: float | None
    """Of all GPUs, which are paid for whether they wait or not."""


_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """All that a plan says.

    Raises:
        ConfigurationError: the batch does not divide over the GPUs, nothing fits into
            their memory, or their peak is not known for the precision.
    """

    training: TrainingConfig
    """Batch, length and precision of the run."""
    configs: tuple[TemporalEigenstateConfig, ...]
    """The model, with each checkpointing that may be chosen."""
    stages: tuple[tuple[str, Sharding], ...]
    """DeepSpeed configurations that may be chosen, by name, the one that shards least
    first; of one rank each."""
    machine: MachineOptions
    """What it is to run on."""

    def __post_init__(self) -> None:
        if self.training.precision == "fp32" and self.machine.peak_tflops is None:
            raise ConfigurationError(
                "--precision fp32: the peaks known here are those of 16 bits, give "
                "--peak_tflops of your GPU in float32"
            )
        # What cannot be had is refused here, not where it is first asked for.
        _ = self.steps, self.chosen

    @functools.cached_property
    def topology(self) -> Topology:
        """GPUs of the run and their links."""
        return self.machine.topology()

    @functools.cached_property
    def speeds(self) -> Speeds:
        """How fast a GPU is assumed to be."""
        return self.machine.speeds()

    @property
    def memory_bytes(self) -> float:
        """Of a GPU, for tensors."""
        return self.machine.memory_bytes * self.machine.usable_memory

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.training.global_batch_size * self.training.seq_len

    @functools.cached_property
    def steps(self) -> int | None:
        """Of the run, or None where its length is not known."""
        steps = make_schedule(self.training, self.machine.gpus, None).steps
        return steps if self.training.tokens or self.training.steps else None

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """Every way to train that was looked at."""
        return self._layouts(self.topology)

    @functools.cached_property
    def chosen(self) -> Layout:
        """The one to train with."""
        chosen = best(self.layouts)
        if chosen is None:
            raise ConfigurationError(_what_would_fit(self))
        return chosen

    @functools.cached_property
    def scaling(self) -> list[ScalePoint]:
        """The run on powers of two, in nodes like those it is planned for, the batch
        unchanged."""
        points: list[ScalePoint] = []
        reference = 0.0
        for gpus in NUMBERS_OF_GPUS:
            reason = self._why_not(gpus)
            # As many nodes as they take, or a part of one.
            per_node = min(gpus, self.machine.gpus_per_node)
            there = dataclasses.replace(
                self.topology, nodes=-(-gpus // per_node), gpus_per_node=per_node
            )
            layout = None if reason else best(self._layouts(there))
            if layout is None:
                reason = reason or "does not fit"
                points.append(ScalePoint(gpus, None, 0.0, 0.0, reason))
                continue
            rate = self.tokens_per_step / layout.time.total
            reference = reference or rate / gpus
            efficiency = rate / gpus / reference
            if efficiency < LEAST_EFFICIENCY:
                reason = f"below {LEAST_EFFICIENCY:.0%} of the work of each GPU"
            points.append(ScalePoint(gpus, layout, rate, efficiency, reason))
        return points

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens_per_step / self.chosen.time.total

    def cost(self, gpus: int, tokens_per_second: float) -> Cost:
        """Of the run on so many GPUs."""
        if self.steps is None:
            return Cost(None, None)
        seconds = self.steps * self.tokens_per_step / tokens_per_second
        days, price = seconds / (24 * _HOUR), self.machine.dollars_per_gpu_hour
        return Cost(days, None if price is None else gpus * seconds / _HOUR * price)

    def _layouts(self, topology: Topology) -> list[Layout]:
        """For each configuration and checkpointing the largest micro-batch that fits, or
        the smallest where none does."""
        return [
            self._largest(name, config, sharding, topology)
            for name, sharding in self.stages
            for config in self.configs
        ]

    def _largest(
        self,
        name: str,
        config: TemporalEigenstateConfig,
        sharding: Sharding,
        topology: Topology,
    ) -> Layout:
        training, ranks = self.training, topology.ranks
        sharding = dataclasses.replace(sharding, ranks=ranks)
        for rows in self._micro_batches(ranks):
            steps = training.global_batch_size // (ranks * rows)
            work = Workload(
                rows, training.seq_len, steps, training.precision, training.optimizer
            )
            memory = peak_memory(config, sharding, work)
            if fits := memory.total <= self.memory_bytes:
                break
        time = step_time(config, sharding, work, topology, self.speeds)
        return Layout(name, config, sharding, work, memory, time, fits)

    def _micro_batches(self, ranks: int) -> list[int]:
        """Sizes to try, largest first."""
        if self.training.micro_batch_size is not None:
            return [self.training.micro_batch_size]
        share = self.training.global_batch_size // ranks
        most = max(1, min(share, MOST_TOKENS_AT_ONCE // self.training.seq_len))
        return [rows for rows in range(most, 0, -1) if share % rows == 0]

    def _why_not(self, gpus: int) -> str:
        """Why the batch cannot be divided over so many GPUs; empty if it can."""
        batch = self.training.global_batch_size
        if gpus > batch:
            return f"more GPUs than the batch has rows, {batch}"
        if batch % (gpus * (self.training.micro_batch_size or 1)):
            return f"the batch of {batch} rows does not divide"
        return ""


def best(layouts: Sequence[Layout]) -> Layout | None:
    """The first that fits and is as fast as any, to :data:`AS_FAST`; the first shards
    least and recomputes least. None where nothing fits."""
    fitting = [layout for layout in layouts if layout.fits]
    fastest = min((layout.time.total for layout in fitting), default=0.0)
    return next((one for one in fitting if one.time.total <= AS_FAST * fastest), None)


def _what_would_fit(plan: CostPlan) -> str:
    """That nothing fits, and what to change."""
    machine = plan.machine
    least = min(plan.layouts, key=lambda layout: layout.memory.total)
    larger = [
        name
        for name, other in DEVICES.items()
        if other.memory_bytes * machine.usable_memory >= least.memory.total
    ]
    more = [p.gpus for p in plan.scaling if p.layout and p.gpus > machine.gpus]
    cures = [f"--device {' or '.join(larger)}"] if larger else []
    cures += [f"{more[0]} GPUs"] if more else []
    return (
        f"nothing fits: {plan.memory_bytes / GIB:.1f} GiB of a GPU are usable, and "
        f"the least is {least.memory.total / GIB:.1f} GiB, with --deepspeed_config "
        f"{least.name}, --gradient_checkpointing {least.config.gradient_checkpointing} "
        f"and --micro_batch_size {least.work.rows}: take "
        f"{', or '.join([*cures, 'a shorter --seq_len'])}"
    )

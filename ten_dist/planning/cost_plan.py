"""Everything that is known of a run before it is paid for, and what it will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError
from ten_dist.planning.choice import Layout, Planner, ScalePoint, scale
from ten_dist.planning.communication import Topology
from ten_dist.planning.machines import DEVICES, GIB, MachineOptions
from ten_dist.planning.sharding import Sharding
from ten_dist.schedule import make_schedule

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run; None where its length or the price of a GPU is not known."""

    days: float | None
    """From its first step to its last."""
    dollars: float | None
    """Of all GPUs, which are paid for whether they wait or not."""


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """All that a plan says."""

    preset: str
    device: str
    """The GPU, in words."""
    planner: Planner
    topology: Topology
    layouts: Sequence[Layout]
    """Every way that was looked at."""
    chosen: Layout
    scaling: Sequence[ScalePoint]
    steps: int | None
    """Of the run, or None where its length is not known."""
    dollars_per_gpu_hour: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.planner.tokens_per_step / self.chosen.time.total

    def cost(self, gpus: int, tokens_per_second: float) -> Cost:
        """Of the run on so many GPUs."""
        if self.steps is None:
            return Cost(None, None)
        seconds = self.steps * self.planner.tokens_per_step / tokens_per_second
        days, price = seconds / (24 * _HOUR), self.dollars_per_gpu_hour
        return Cost(days, None if price is None else gpus * seconds / _HOUR * price)


def make_cost_plan(
    training: TrainingConfig,
    configs: Sequence[TemporalEigenstateConfig],
    stages: Sequence[tuple[str, Sharding]],
    machine: MachineOptions,
) -> CostPlan:
    """Plan a run.

    Args:
        training: batch, length and precision of the run.
        configs: the model, with each checkpointing that may be chosen.
        stages: DeepSpeed configurations that may be chosen, by name, the one that shards
            least first.
        machine: what it is to run on.

    Raises:
        ConfigurationError: the batch does not divide over the GPUs, nothing fits into
            their memory, or their peak is not known for the precision.
    """
    if training.precision == "fp32" and machine.peak_tflops is None:
        raise ConfigurationError(
            "--precision fp32: the peaks known here are those of 16 bits, give "
            "--peak_tflops of your GPU in float32"
        )
    steps = make_schedule(training, machine.gpus, None).steps
    planner = Planner(
        configs=tuple(configs),
        stages=tuple(stages),
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        precision=training.precision,
        memory_bytes=machine.memory_bytes * machine.usable_memory,
        speeds=machine.speeds(),
    )
    topology = machine.topology()
    layouts = planner.layouts(topology)
    chosen, scaling = planner.best(layouts), scale(planner, topology)
    if chosen is None:
        raise ConfigurationError(_what_would_fit(layouts, scaling, machine))
    return CostPlan(
        preset=training.config,
        device=machine.describe(),
        planner=planner,
        topology=topology,
        layouts=layouts,
        chosen=chosen,
        scaling=scaling,
        steps=steps if training.tokens or training.steps else None,
        dollars_per_gpu_hour=machine.dollars_per_gpu_hour,
    )


def _what_would_fit(
    layouts: Sequence[Layout],
    scaling: Sequence[ScalePoint],
    machine: MachineOptions,
) -> str:
    """That nothing fits, and what to change."""
    least = min(layouts, key=lambda layout: layout.memory.total)
    larger = [
        name
        for name, other in DEVICES.items()
        if other.memory_bytes * machine.usable_memory >= least.memory.total
    ]
    more = [p.gpus for p in scaling if p.layout is not None and p.gpus > machine.gpus]
    cures = [f"--device {' or '.join(larger)}"] if larger else []
    cures += [f"{more[0]} GPUs"] if more else []
    usable = machine.memory_bytes * machine.usable_memory
    return (
        f"nothing fits: {usable / GIB:.1f} GiB of a GPU are usable, and "
        f"the least is {least.memory.total / GIB:.1f} GiB, with --deepspeed_config "
        f"{least.name}, --gradient_checkpointing {least.config.gradient_checkpointing} "
        f"and --micro_batch_size {least.work.rows}: take "
        f"{', or '.join([*cures, 'a shorter --seq_len'])}"
    )

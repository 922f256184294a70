"""Everything that is known of a run before it is paid for, and what it will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError
from ten_dist.planning.choice import Layout, Planner, Request, ScalePoint, scale
from ten_dist.planning.communication import Topology
from ten_dist.planning.machines import DEVICES, GIB, MachineOptions
from ten_dist.planning.sharding import Sharding
from ten_dist.schedule import make_schedule

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    seconds: float
    gpus: int
    dollars_per_gpu_hour: float | None
    """Price, or None where it is not known."""

    @property
    def days(self) -> float:
        """From its first step to its last."""
        return self.seconds / (24 * _HOUR)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together, which are paid for whether they wait or not."""
        return self.gpus * self.seconds / _HOUR

    @property
    def dollars(self) -> float | None:
        """Price of all of it, or None."""
        if self.dollars_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.dollars_per_gpu_hour


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
        return self.planner.request.tokens_per_step / self.chosen.time.total

    def cost(self, gpus: int, tokens_per_second: float) -> Cost | None:
        """Of the run on so many GPUs, or None where its length is not known."""
        if self.steps is None:
            return None
        tokens = self.steps * self.planner.request.tokens_per_step
        return Cost(tokens / tokens_per_second, gpus, self.dollars_per_gpu_hour)


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
    request = Request(
        configs=tuple(configs),
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
        stages=tuple(stages),
        memory_bytes=machine.memory_bytes * machine.usable_memory,
    )
    planner, topology = Planner(request, machine.speeds()), machine.topology()
    layouts = planner.layouts(topology)
    chosen, scaling = planner.best(layouts), scale(planner, topology)
    if chosen is None:
        raise ConfigurationError(_what_would_fit(layouts, scaling, request, machine))
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
    request: Request,
    machine: MachineOptions,
) -> str:
    """That nothing fits, and what to change."""
    least = min(layouts, key=lambda layout: layout.memory.total)
    larger = [
        other.name
        for other in DEVICES.values()
        if other.memory_bytes * machine.usable_memory >= least.memory.total
    ]
    more = [p.gpus for p in scaling if p.layout is not None and p.gpus > machine.gpus]
    cures = [f"--device {' or '.join(larger)}"] if larger else []
    cures += [f"{more[0]} GPUs"] if more else []
    return (
        f"nothing fits: {request.memory_bytes / GIB:.1f} GiB of a GPU are usable, and "
        f"the least is {least.memory.total / GIB:.1f} GiB, with --deepspeed_config "
        f"{least.name}, --gradient_checkpointing {least.config.gradient_checkpointing} "
        f"and --micro_batch_size {least.work.rows}: take "
        f"{', or '.join([*cures, 'a shorter --seq_len'])}"
    )

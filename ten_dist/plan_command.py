"""Say what a run will take before it is paid for: memory, time, dollars.

ten-dist plan --config xlarge --nodes 4 --gpus_per_node 8 --tokens 26e9

Needs neither a GPU nor data. For every ZeRO stage, with and without recomputation: the
memory of a GPU by part, and the largest micro-batch that fits; of those that fit, the
fastest. Then how long a step takes, term by term, the run in days and dollars, and how it
scales from 1 to 1024 GPUs. Memory, operations and what is communicated are counted from
the model and checked against measurements; speeds are assumed, and each one is an option.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.errors import ConfigurationError
from ten_dist.options import add_options, given_options
from ten_dist.train import add_model_options, resolve_model_options
from ten_dist.training_config import TrainingConfig

_RUN_OPTIONS = (
    "config",
    "tokens",
    "steps",
    "seq_len",
    "global_batch_size",
    "micro_batch_size",
    "precision",
)
_SHIPPED = ("zero0", "zero1", "zero2", "zero3", "offload")
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The machines that a run is planned for; every field is an option."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each."""
    device: str = "h100"
    """Kind of GPU, by data sheet: h100, h100_pcie, h200, a100, a100_40gb, l40s, mi300x or
    mi325x."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU in GiB, instead of the data sheet's."""
    peak_tflops: float | None = None
    """Dense bfloat16 TFLOP/s of a GPU, instead of the data sheet's."""
    usable_memory: float = 0.9
    """Share of a GPU's memory that tensors can have: the rest goes to the driver, NCCL
    and what the allocator cannot use. Assumed."""
    mfu: float = 0.3
    """Share of the peak that the operations reach. Assumed; `benchmarks.gpu` measures
    it."""
    overlap: float = 0.0
    """Share of the computation behind which communication hides; none as long as
    overlap_comm is off in ds_configs/."""
    node_gigabytes: float | None = None
    """GB/s, one way, from a GPU to the others of its node, instead of the data
    sheet's."""
    node_microseconds: float = 3.0
    """Latency of a message in a node. Assumed."""
    network_gigabits: float | None = None
    """Gbit/s, one way, from a whole node to the others; by default what nodes of such
    GPUs are usually built with."""
    network_microseconds: float = 10.0
    """Latency of a message between nodes. Assumed."""
    dollars_per_gpu_hour: float | None = None
    """Price of one GPU for one hour, for the cost of the run."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"--{name} must be 1 or more, not {getattr(self, name)}"
                )
        for name in ("usable_memory", "mfu"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(
                    f"--{name} must be more than 0 and at most 1, "
                    f"not {getattr(self, name)}"
                )
        if not 0 <= self.overlap <= 1:
            raise ConfigurationError(
                f"--overlap must be between 0 and 1, not {self.overlap}"
            )
        for name in ("node_microseconds", "network_microseconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"--{name} must be 0 or more, not {getattr(self, name)}"
                )
        for name in (
            "gpu_memory_gib",
            "peak_tflops",
            "node_gigabytes",
            "network_gigabits",
            "dollars_per_gpu_hour",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"--{name} must be more than 0, not {value}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist plan`."""
    run_options = parser.add_argument_group("run", "as those of ten-dist train")
    add_options(run_options, TrainingConfig, only=_RUN_OPTIONS)
    add_options(
        run_options,
        TrainingConfig,
        default_help=f"the fastest that fits of {', '.join(_SHIPPED)}",
        only=("deepspeed_config",),
    )
    add_options(parser.add_argument_group("machine"), MachineOptions)
    add_model_options(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the plan to FILE as JSON, too"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a plan.

    Raises:
        ConfigurationError: an option is wrong, the batch does not divide over the GPUs, or
            nothing fits into their memory.
    """
    # Imported here: torch takes seconds, and `--help` need not wait.
    from ten_dist.files import write_json
    from ten_dist.monitor.console import say
    from ten_dist.planning.report import describe, to_dict

    plan = make_plan(arguments)
    for line in describe(plan):
        say(line)
    if arguments.json is not None:
        try:
            write_json(arguments.json, to_dict(plan))
        except OSError as error:
            raise ConfigurationError(
                f"--json {arguments.json} cannot be written: {error.strerror}"
            ) from None


def make_plan(arguments: argparse.Namespace) -> Any:
    """The plan that the options describe, a :class:`ten_dist.planning.report.Plan`.

    Raises:
        ConfigurationError: see :func:`run`.
    """
    from ten_dist.engine.plan import make_plan as plan_of_run
    from ten_dist.planning.choice import Planner, Request
    from ten_dist.planning.devices import DEVICES, find_device
    from ten_dist.planning.report import Plan
    from ten_dist.planning.scaling import scale
    from ten_dist.planning.timing import Speeds
    from ten_dist.planning.topology import Topology

    machine = MachineOptions(**given_options(arguments, MachineOptions))
    device = find_device(machine.device)
    given = given_options(arguments, TrainingConfig)
    # A dry run needs no data.
    training = TrainingConfig(**given, dry_run=True)
    gpus = machine.nodes * machine.gpus_per_node
    steps = plan_of_run(training, gpus, None).steps
    memory = device.memory_bytes
    if machine.gpu_memory_gib is not None:
        memory = machine.gpu_memory_gib * _GIB
    request = Request(
        configs=_configs(arguments, training.config),
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
        stages=_stages(given.get("deepspeed_config"), training.precision),
        memory_bytes=memory * machine.usable_memory,
    )
    planner = Planner(
        request,
        Speeds(
            peak_flops=(machine.peak_tflops or device.peak_flops / 1e12) * 1e12,
            utilization=machine.mfu,
            memory_bandwidth=device.memory_bandwidth,
            overlap=machine.overlap,
        ),
    )
    gigabits = machine.network_gigabits
    network = device.network_bandwidth * machine.gpus_per_node
    topology = Topology(
        nodes=machine.nodes,
        gpus_per_node=machine.gpus_per_node,
        node_bandwidth=(machine.node_gigabytes or device.node_bandwidth / 1e9) * 1e9,
        network_bandwidth=network if gigabits is None else gigabits * 1e9 / 8,
        node_latency=machine.node_microseconds * 1e-6,
        network_latency=machine.network_microseconds * 1e-6,
    )
    layouts = planner.layouts(topology)
    chosen = planner.best(layouts)
    scaling = scale(planner, topology)
    if chosen is None:
        least = min(layouts, key=lambda layout: layout.memory.total)
        more = next((p.gpus for p in scaling if p.layout and p.gpus > gpus), None)
        larger = [
            other.name
            for other in DEVICES.values()
            if other.memory_bytes * machine.usable_memory >= least.memory.total
        ]
        cures = ["a shorter --seq_len"]
        if more is not None:
            cures.insert(0, f"{more} GPUs")
        if larger:
            cures.insert(0, f"--device {' or '.join(larger)}")
        raise ConfigurationError(
            f"nothing fits: {request.memory_bytes / _GIB:.1f} GiB of a GPU are usable, "
            f"and the least is {least.memory.total / _GIB:.1f} GiB, with "
            f"--deepspeed_config {least.name}, --gradient_checkpointing "
            f"{least.config.gradient_checkpointing} and --micro_batch_size "
            f"{least.work.rows}: take {', or '.join(cures)}"
        )
    description = (
        f"{machine.device} (assumed: {memory / _GIB:.1f} GiB, "
        f"{planner.speeds.peak_flops / 1e12:.1f} TFLOP/s dense bfloat16"
        f"; {device.node_link} in a node)"
    )
    return Plan(
        preset=training.config,
        device=description,
        planner=planner,
        topology=topology,
        layouts=layouts,
        chosen=chosen,
        scaling=scaling,
        steps=steps if training.tokens or training.steps else None,
        dollars_per_gpu_hour=machine.dollars_per_gpu_hour,
    )


def _configs(
    arguments: argparse.Namespace, preset: str
) -> tuple[TemporalEigenstateConfig, ...]:
    """The model, with each checkpointing, or with the one that was asked for."""
    options = resolve_model_options(arguments, preset)
    modes = ("none", "block")
    if "gradient_checkpointing" in options:
        modes = (options.pop("gradient_checkpointing"),)
    return tuple(
        TemporalEigenstateConfig.preset(preset, **options, gradient_checkpointing=mode)
        for mode in modes
    )


def _stages(name: str | None, precision: str) -> tuple[tuple[str, Any], ...]:
    """The DeepSpeed configurations that may be chosen, one if it was asked for."""
    from ten_dist.engine.deepspeed_config import (
        check_precision,
        load_deepspeed_file,
    )
    from ten_dist.planning.sharding import Sharding

    if name is not None:
        content = load_deepspeed_file(name)
        check_precision(precision, content, name)
        return ((Path(name).stem, Sharding.from_file(content)),)
    return tuple(
        (shipped, Sharding.from_file(load_deepspeed_file(shipped)))
        for shipped in _SHIPPED
        if not (precision == "bf16_params" and shipped == "zero0")
    )

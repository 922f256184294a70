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
import contextlib
from pathlib import Path

from ten_dist.commands.train import add_model_options, resolve_model_options
from ten_dist.config.command_line import add_options, given_options
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.console import say
from ten_dist.deepspeed_config import (
    check_precision,
    load_deepspeed_file,
    swaps_to_nvme,
)
from ten_dist.errors import ConfigurationError
from ten_dist.files import write_json
from ten_dist.planning.machine import MachineOptions
from ten_dist.planning.plan import make_plan
from ten_dist.planning.report import describe, to_dict
from ten_dist.planning.sharding import Sharding

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
    machine = parser.add_argument_group("machine")
    add_options(machine, MachineOptions)
    machine.add_argument(
        "--size",
        metavar="SLUG",
        help="size of the nodes at DigitalOcean, whose GPUs and price of this moment are "
        "read from its API with the token in DIGITALOCEAN_TOKEN; replaces "
        "--gpus_per_node and --dollars_per_gpu_hour",
    )
    add_model_options(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the plan to FILE as JSON, too"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a plan.

    Raises:
        ConfigurationError: an option is wrong, the batch does not divide over the GPUs,
            nothing fits into their memory, or the file cannot be written.
    """
    given = given_options(arguments, TrainingConfig)
    # As a dry run, it needs no data.
    training = TrainingConfig(**given, dry_run=True)
    plan = make_plan(
        training,
        _configs(arguments, training.config),
        _stages(given.get("deepspeed_config"), training.precision),
        _machine(arguments),
    )
    if arguments.json is not None:
        try:
            write_json(arguments.json, to_dict(plan))
        except OSError as error:
            raise ConfigurationError(
                f"--json {arguments.json} cannot be written: {error.strerror}"
            ) from None
    for line in describe(plan):
        say(line)


def _machine(arguments: argparse.Namespace) -> MachineOptions:
    """The machines that the options describe, as they are sold now if `--size` asks.

    Raises:
        ConfigurationError: an option is wrong, or there is no such size with GPUs.
    """
    given = given_options(arguments, MachineOptions)
    if arguments.size is None:
        return MachineOptions(**given)
    for name in ("gpus_per_node", "dollars_per_gpu_hour"):
        if name in given:
            raise ConfigurationError(
                f"--size and --{name} both say what a node is: leave one out"
            )
    from launch.droplets.api import Api, ApiConfig
    from launch.droplets.catalogue import Catalogue

    with contextlib.closing(Api(ApiConfig())) as api:
        size = Catalogue(api).size(arguments.size)
    if not size.gpus:
        raise ConfigurationError(f"--size {size.slug} has no GPUs: choose another")
    say(
        f"{size.slug}: {size.gpus} x {size.gpu_model}, ${size.hourly_price:,.2f} an hour "
        f"now, in {', '.join(size.regions) or 'no region at the moment'}"
    )
    price = size.hourly_price / size.gpus
    return MachineOptions(**given, gpus_per_node=size.gpus, dollars_per_gpu_hour=price)


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


def _stages(name: str | None, precision: str) -> tuple[tuple[str, Sharding], ...]:
    """The DeepSpeed configurations that may be chosen, one if it was asked for."""
    if name is not None:
        content = load_deepspeed_file(name)
        if swaps_to_nvme(content):
            raise ConfigurationError(
                f"--deepspeed_config {name} swaps to NVMe, whose speed decides and is not "
                "known here: plan with offload, which needs the same memory of a GPU"
            )
        check_precision(precision, content, name)
        return ((Path(name).stem, Sharding.from_file(content)),)
    return tuple(
        (shipped, Sharding.from_file(load_deepspeed_file(shipped)))
        for shipped in _SHIPPED
        if not (precision == "bf16_params" and shipped == "zero0")
    )

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
from pathlib import Path

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given, given_options
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.options import options_of
from ten_dist.config.run_options import add_model_options, given_model_options
from ten_dist.config.training import TrainingConfig
from ten_dist.console import say
from ten_dist.deepspeed_config import (
    check_optimizer,
    check_precision,
    load_deepspeed_file,
    swaps_to_nvme,
)
from ten_dist.errors import ConfigurationError
from ten_dist.files import write_json
from ten_dist.planning.cost_plan import CostPlan
from ten_dist.planning.machines import MachineOptions
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
    "optimizer",
)
_SHIPPED = ("zero0", "zero1", "zero2", "zero3", "offload")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist plan`."""
    add_options(parser, TrainingConfig, only=_RUN_OPTIONS)
    add_options(
        parser,
        TrainingConfig,
        default_help=f"the fastest that fits of {', '.join(_SHIPPED)}",
        only=("deepspeed_config",),
    )
    # The file of a training is that of its plan.
    parser.takes_runs = True
    parser.passed_over.update(options_of(TrainingConfig))
    add_options(parser, MachineOptions)
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
    run_options = given_options(arguments, TrainingConfig)
    # As a dry run, it needs no data.
    training = TrainingConfig(**run_options, dry_run=True)
    plan = CostPlan(
        training,
        _configs(arguments, training.config),
        _stages(run_options.get("deepspeed_config"), training),
        given(arguments, MachineOptions),
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


def _configs(
    arguments: argparse.Namespace, preset: str
) -> tuple[TemporalEigenstateConfig, ...]:
    """The model, with each checkpointing, or with the one that was asked for."""
    options = given_model_options(arguments, preset)
    modes: tuple[str, ...] = ("none", "block")
    if "gradient_checkpointing" in options:
        modes = (options.pop("gradient_checkpointing"),)
    return tuple(
        TemporalEigenstateConfig.preset(preset, **options, gradient_checkpointing=mode)
        for mode in modes
    )


def _stages(
    name: str | None, training: TrainingConfig
) -> tuple[tuple[str, Sharding], ...]:
    """The DeepSpeed configurations that may be chosen, one if it was asked for."""
    if name is not None:
        content = load_deepspeed_file(name)
        if swaps_to_nvme(content):
            raise ConfigurationError(
                f"--deepspeed_config {name} swaps to NVMe, whose speed decides and is not "
                "known here: plan with offload, which needs the same memory of a GPU"
            )
        check_precision(training.precision, content, name)
        check_optimizer(content, training)
        return ((Path(name).stem, Sharding.from_file(content)),)
    return tuple(
        (shipped, Sharding.from_file(load_deepspeed_file(shipped)))
        for shipped in _SHIPPED
        if not (training.precision == "bf16_params" and shipped == "zero0")
    )

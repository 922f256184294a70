"""Train a TEN or HTEN, or continue a run.

Under a launcher:  deepspeed launch/train.py --config nano --data DATA --output_dir RUN
As one process:    ten-dist train --config nano --data DATA --output_dir RUN

Batch arithmetic, the derived DeepSpeed configuration and everything that was resolved
are printed first and written to RUN/config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ten_dist.config import (
    DEFAULT_HTEN_SCALES,
    PAPER,
    PRESETS,
    TemporalEigenstateConfig,
)
from ten_dist.errors import ConfigurationError
from ten_dist.library_settings import check_library_settings
from ten_dist.options import add_options, given_options
from ten_dist.own_rank import take_part
from ten_dist.training_config import TrainingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist train`."""
    add_options(parser.add_argument_group("run"), TrainingConfig)
    add_model_options(parser)
    # The deepspeed launcher passes this; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that replace fields of the preset, see
    :func:`resolve_model_options`."""
    model = parser.add_argument_group("model", "replace what the preset says")
    model.add_argument(
        "--use_hten",
        action="store_true",
        help="give a preset without scales the scales "
        f"{','.join(map(str, DEFAULT_HTEN_SCALES))}, unless --hten_scales says others",
    )
    model.add_argument(
        "--paper",
        action="store_true",
        help="the recurrence of the paper, exactly, instead of what measured best: "
        + ", ".join(f"{name} {value}" for name, value in PAPER.items()),
    )
    add_options(
        model,
        TemporalEigenstateConfig,
        default_help="the preset's",
        # That of the data, with --document_masking.
        # Taken from the data, see --document_masking.
        only=_model_options(),
    )


def _model_options() -> set[str]:
    fields = {field.name for field in dataclasses.fields(TemporalEigenstateConfig)}
    return fields - {"document_separator_id"}


def run(arguments: argparse.Namespace) -> None:
    """Train as the options say.

    Raises:
        ConfigurationError: see :func:`ten_dist.engine.run.train`.
    """
    take_part()
    training = TrainingConfig(**given_options(arguments, TrainingConfig))
    model_options = resolve_model_options(arguments, training.config)
    check_library_settings()

    from ten_dist.engine.run import train

    train(training, model_options)


def resolve_model_options(arguments: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Model fields given on the command line, checked against the preset.

    Raises:
        ConfigurationError: the combination is not valid.
    """
    options = given_options(arguments, TemporalEigenstateConfig)
    for flag in ("paper", "use_hten"):
        if getattr(arguments, flag) and options.get("mixer") == "attention":
            raise ConfigurationError(
                f"--{flag} has no effect with --mixer attention: leave it out"
            )
    if arguments.paper:
        options = {**PAPER, **options}
    scales_known = "hten_scales" in options or "hten_scales" in PRESETS.get(preset, {})
    if arguments.use_hten and not scales_known:
        options["hten_scales"] = DEFAULT_HTEN_SCALES
    TemporalEigenstateConfig.preset(preset, **options)
    return options

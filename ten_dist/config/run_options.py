"""The options of a training run on a command line: those of the run and of its model."""

from __future__ import annotations

import argparse
from typing import Any

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given, given_options
from ten_dist.config.model import (
    DEFAULT_HTEN_SCALES,
    PAPER,
    PRESETS,
    TemporalEigenstateConfig,
)
from ten_dist.config.options import options_of
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError


def add_run_options(parser: ArgumentParser) -> None:
    """Add every option of `ten-dist train`."""
    add_options(parser, TrainingConfig)
    parser.takes_runs = True
    add_model_options(parser)
    # The deepspeed launcher passes this; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def given_run(
    arguments: argparse.Namespace,
) -> tuple[TrainingConfig, dict[str, Any]]:
    """The run that the options of :func:`add_run_options` describe.

    Returns:
        Its options, and the model fields that replace those of the preset.

    Raises:
        ConfigurationError: an option is out of range, or two do not fit together.
    """
    training = given(arguments, TrainingConfig)
    return training, given_model_options(arguments, training.config)


def add_model_options(parser: ArgumentParser) -> None:
    """Add the options that replace fields of the preset, see
    :func:`given_model_options`."""
    model = parser.group("model", "replace what the preset says")
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
    # The separator is taken from the data, see --document_masking.
    names = options_of(TemporalEigenstateConfig).keys() - {"document_separator_id"}
    add_options(
        parser, TemporalEigenstateConfig, default_help="the preset's", only=names
    )


def given_model_options(arguments: argparse.Namespace, preset: str) -> dict[str, Any]:
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
    if arguments.use_hten and "levels" in options:
        raise ConfigurationError(
            "--use_hten and --levels cannot both be given: keep one"
        )
    if arguments.paper:
        options = {**PAPER, **options}
    scales_known = "hten_scales" in options or "hten_scales" in PRESETS.get(preset, {})
    if arguments.use_hten and not scales_known:
        options["hten_scales"] = DEFAULT_HTEN_SCALES
    TemporalEigenstateConfig.preset(preset, **options)
    return options

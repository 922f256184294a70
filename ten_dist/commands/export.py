"""Write a run's model in a form that other tools load.

ten-dist export RUN --output DIR

DIR is then a model for transformers: with it and torch alone, and without ten_dist,
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) has the run's model, and
AutoTokenizer its tokenizer. Before that is said, both models are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch

from ten_dist.arguments import ArgumentParser
from ten_dist.checkpoint import checksum_damage
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import metavar
from ten_dist.console import say
from ten_dist.errors import ConfigurationError
from ten_dist.export.huggingface import export_huggingface
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import CheckpointOptions

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """What is written; each field is an option of `ten-dist export`."""

    output: Annotated[str, metavar("DIR")]
    """New or empty folder to write."""
    format: Literal["huggingface"] = "huggingface"
    """What is to load it: transformers."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist export`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, ExportOptions)


def run(arguments: argparse.Namespace) -> None:
    """Export as the options say.

    Raises:
        ConfigurationError: the run, its checkpoint or an option cannot be used.
        TrainingError: the exported model does not compute what the run's does.
    """
    options = given(arguments, ExportOptions)
    folder = RunFolder(arguments.run)
    folder.read()
    checkpoint = folder.chosen_checkpoint(options.checkpoint)
    found = checksum_damage(checkpoint)
    if found is not None:
        raise ConfigurationError(f"the checkpoint cannot be exported: {found}")
    output = Path(options.output)
    difference = export_huggingface(folder, checkpoint, output, _DTYPES[options.dtype])
    say(
        f"{output}: {checkpoint} for transformers; logits within {difference:.1e} of the "
        "run's"
    )

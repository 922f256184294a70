"""Continue a prompt with a run's model.

The prompt is read once; after it every token costs the same and memory does not grow,
whatever the length.
"""

from __future__ import annotations

import argparse

import torch

from ten_dist.data import load_tokenizer
from ten_dist.errors import ConfigurationError
from ten_dist.monitor.console import say
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist generate`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue [default: the start of a document]",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=200,
        metavar="N",
        help="most tokens to add; a document may end earlier [default: 200]",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the most likely token [default: 0.8]",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        metavar="N",
        help="sample among the N most likely tokens [default: all]",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="X",
        help="sample among the likeliest tokens of this total [default: 1]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the sampling [default: 0]"
    )


def run(arguments: argparse.Namespace) -> None:
    """Generate as the options say.

    Raises:
        ConfigurationError: the folder holds no usable run, or an option is out of range.
    """
    if arguments.max_new_tokens < 1:
        raise ConfigurationError(
            f"--max_new_tokens must be 1 or more, not {arguments.max_new_tokens}"
        )
    if arguments.seed < 0:
        raise ConfigurationError(f"--seed must be 0 or more, not {arguments.seed}")
    folder = RunFolder(arguments.run)
    config = folder.read_config()
    model = TrainedModel.load(folder)
    tokenizer = load_tokenizer(folder.tokenizer_file)
    separator = config["data"]["separator_id"]
    # A document starts where another has ended.
    prompt = tokenizer.encode(arguments.prompt).ids or [separator]
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    try:
        with model.autocast():
            ids = model.network.generate(
                torch.tensor([prompt], device=model.device),
                arguments.max_new_tokens,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                stop_id=separator,
                generator=generator,
            )
    except ValueError as error:
        # What it raises begins with the name of the option.
        raise ConfigurationError(f"--{error}") from None
    added = ids[0, len(prompt) :].tolist()
    say(arguments.prompt + tokenizer.decode(added))

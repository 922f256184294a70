"""Continue a prompt with a run's model.

The prompt is read once; after it every token costs the same and memory does not grow,
whatever the length.
"""

from __future__ import annotations

import argparse
import os

import torch

from ten_dist.console import say
from ten_dist.data.tokenizer import TextTokenizer, read_tokenizer_file
from ten_dist.errors import ConfigurationError
from ten_dist.model.sampling import PROMPT_PIECE
from ten_dist.run_folder import RunFolder
from ten_dist.threads import compute_in_one_thread
from ten_dist.trained_model import TrainedModel

_PARAMETERS_FOR_THREADS = 50_000_000
"""With fewer, one token is too little work to share: threads only wait for each other."""


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
    model = TrainedModel.load(folder)
    separator = folder.read().data.separator_id
    content = read_tokenizer_file(folder.tokenizer_file, str(folder.tokenizer_file))
    tokenizer = TextTokenizer.with_separator_id(content, separator)
    # Where the locale is not of UTF-8, what is not ASCII came as single bytes.
    text = os.fsencode(arguments.prompt).decode("utf-8")
    prompt = tokenizer.encode([text])[0].tolist()
    # A document starts where another has ended.
    start = prompt or [separator]
    small = model.network.num_parameters() < _PARAMETERS_FOR_THREADS
    if small and len(start) <= PROMPT_PIECE:
        compute_in_one_thread()
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    try:
        with model.autocast():
            ids = model.network.generate(
                torch.tensor([start], device=model.device),
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
    added = ids[0, len(start) :].tolist()
    if added[-1:] == [separator]:
        added.pop()
    say(tokenizer.decode(prompt + added))

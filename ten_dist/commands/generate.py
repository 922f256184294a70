"""Continue a prompt with a run's model.

The prompt is read once; after it every token costs the same and memory does not grow,
whatever the length.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Annotated

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import at_least, metavar
from ten_dist.console import say
from ten_dist.data.tokenizer import TextTokenizer, read_tokenizer_file
from ten_dist.generation import Request, Sampling
from ten_dist.generation.decoder import PROMPT_PIECE
from ten_dist.run_folder import RunFolder
from ten_dist.threads import compute_in_one_thread
from ten_dist.trained_model import CheckpointOptions, TrainedModel

_PARAMETERS_FOR_THREADS = 50_000_000
"""With fewer, one token is too little work to share: threads only wait for each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(CheckpointOptions, Sampling):
    """What is generated; each field is an option of `ten-dist generate`."""

    prompt: Annotated[str, metavar("TEXT")] = ""
    """Text to continue; by default the start of a document."""
    max_new_tokens: Annotated[int, at_least(1)] = 200
    """Most tokens to add; a document may end earlier."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist generate`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, GenerationOptions)


def run(arguments: argparse.Namespace) -> None:
    """Generate as the options say.

    Raises:
        ConfigurationError: the folder holds no usable run, or an option is out of range.
    """
    options = given(arguments, GenerationOptions)
    folder = RunFolder(arguments.run)
    model = TrainedModel.load(folder, options.checkpoint)
    separator = folder.read().data.separator_id
    content = read_tokenizer_file(folder.tokenizer_file, str(folder.tokenizer_file))
    tokenizer = TextTokenizer.with_separator_id(content, separator)
    # Where the locale is not of UTF-8, what is not ASCII came as single bytes.
    text = os.fsencode(options.prompt).decode("utf-8")
    prompt = tokenizer.encode([text])[0].tolist()
    # A document starts where another has ended.
    start = prompt or [separator]
    small = model.network.num_parameters() < _PARAMETERS_FOR_THREADS
    if small and len(start) <= PROMPT_PIECE:
        compute_in_one_thread()
    request = Request(
        prompt=start,
        max_new_tokens=options.max_new_tokens,
        sampling=options,
        stop_ids=[separator],
    )
    decoder = model.decoder()
    generated = decoder.add(request)
    while len(decoder):
        decoder.step()
    added = generated.ids
    if generated.finish_reason == "stop":
        added.pop()
    say(tokenizer.decode(prompt + added))

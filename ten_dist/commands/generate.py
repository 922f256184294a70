"""Continue prompts with a run's model.

A prompt is read once; after it every token costs the same and memory does not grow,
whatever the length. Prompts from a file are continued many at once, each as it would be
alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

from ten_dist.arguments import ArgumentParser, text_of
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import REPEATED, at_least, metavar
from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.generation import Request, Sampling, Token
from ten_dist.generation.decoder import PROMPT_PIECE
from ten_dist.inference.in_order import Piece, completed_in_order
from ten_dist.inference.prompt_lines import (
    STANDARD,
    check_output,
    check_prompts,
    lines_to,
    read_prompts,
)
from ten_dist.inference.shared_prompts import SharedPrompts
from ten_dist.inference.terminal_text import show
from ten_dist.run_folder import RunFolder
from ten_dist.threads import compute_in_one_thread
from ten_dist.trained_model import CheckpointOptions, TrainedModel, tokenizer_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(CheckpointOptions, Sampling):
    """What is generated; each field is an option of `ten-dist generate`."""

    ALTERNATIVES = ("prompt", "prompts")

    prompt: Annotated[str | None, metavar("TEXT")] = None
    """Text to continue; by default the start of a document."""
    prompts: Annotated[str | None, metavar("FILE|-")] = None
    """File with a JSON object a line, {"prompt": TEXT}, or - for the standard input; other
    fields come back in the output."""
    output: Annotated[str | None, metavar("FILE|-")] = None
    """Write a JSON object a line, in the order of the prompts, to this file, or - for the
    standard output; by default so for --prompts, and plain text for one prompt."""
    max_new_tokens: Annotated[int, at_least(1)] = 200
    """Most tokens to add; a document may end earlier."""
    samples: Annotated[int, at_least(1)] = 1
    """Continuations of each prompt; number i, from 0, is drawn with seed + i."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Most continuations at once."""
    stop: Annotated[tuple[str, ...], metavar("TEXT"), REPEATED] = ()
    """End a continuation before this text; can be given several times."""
    logprobs: Annotated[int | None, at_least(0)] = None
    """With each token its log-probability, and those of the N likeliest tokens; in JSON."""
    stream: bool | None = None
    """Show text as it comes; by default on a terminal."""

    @property
    def in_json(self) -> bool:
        """Whether the output is JSON."""
        return self.prompts is not None or self.output is not None

    def check_together(self) -> None:
        if self.logprobs is not None and not self.in_json:
            raise ConfigurationError(
                "--logprobs are written in JSON: add --output FILE, or - for the "
                "standard output"
            )
        if self.stream and self.in_json:
            raise ConfigurationError(
                "--stream shows plain text: leave it out with --prompts and --output"
            )
        # The largest one, so that none is refused later.
        dataclasses.replace(Sampling(), seed=self.seed + self.samples - 1)


class _Sample(NamedTuple):
    """A continuation to be made."""

    fields: dict[str, Any]
    """Of the prompt's line."""
    shown: str
    """The prompt as its tokens say it."""
    number: int
    """Among those of its prompt, from 0."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist generate`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, GenerationOptions)


def run(arguments: argparse.Namespace) -> None:
    """Generate as the options say.

    Raises:
        ConfigurationError: the folder holds no usable run, a file cannot be read or
            written, a line of it is no prompt, or an option is out of range.
    """
    options = given(arguments, GenerationOptions)
    if options.prompts is not None:
        check_prompts(options.prompts)
    if options.output is not None:
        check_output(options.output)
    folder = RunFolder(arguments.run)
    model = TrainedModel.load(folder, options.checkpoint)
    tokenizer = tokenizer_of(folder)
    pieces = _completed(options, model, tokenizer)
    if options.in_json:
        _write_lines(options, pieces, tokenizer)
    else:
        try:
            _write_text(options, pieces)
        except KeyboardInterrupt:
            show("\n")
            raise


def _completed(
    options: GenerationOptions, model: TrainedModel, tokenizer: TextTokenizer
) -> Iterator[Piece[_Sample]]:
    """The continuations that the options ask for, piece by piece."""
    shared = SharedPrompts(options.batch_size) if options.samples > 1 else None
    one = options.samples == 1 and options.prompts is None
    batch = 1 if one else options.batch_size
    if model.prefers_one_thread() and len(options.prompt or "") <= PROMPT_PIECE:
        compute_in_one_thread()
    return completed_in_order(
        model.decoder(shared),
        _requests(options, tokenizer, shared),
        tokenizer.decode,
        [text_of(text) for text in options.stop],
        batch,
    )


def _requests(
    options: GenerationOptions, tokenizer: TextTokenizer, shared: SharedPrompts | None
) -> Iterator[tuple[_Sample, Request]]:
    """The requests for all samples of all prompts."""
    separator = tokenizer.separator_id
    prompts: Iterable[tuple[str, dict[str, Any]]]
    prompts = [("--prompt", {"prompt": text_of(options.prompt or "")})]
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    for where, fields in prompts:
        try:
            ids = tokenizer.encode([fields["prompt"]])[0].tolist()
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        shown = tokenizer.decode(ids)
        # A document starts where another has ended.
        prompt = ids or [separator]
        if shared is not None:
            shared.expect(prompt)
        for number in range(options.samples):
            yield (
                _Sample(fields, shown, number),
                Request(
                    prompt=prompt,
                    max_new_tokens=options.max_new_tokens,
                    sampling=dataclasses.replace(options, seed=options.seed + number),
                    stop_ids=[separator],
                    logprobs=options.logprobs,
                ),
            )


def _write_text(options: GenerationOptions, pieces: Iterator[Piece[_Sample]]) -> None:
    """Prompt and continuation, as they come or when they are complete."""
    streamed = sys.stdout.isatty() if options.stream is None else options.stream
    held, begun = "", False
    for piece in pieces:
        if not begun:
            sample, begun = piece.item, True
            if options.samples > 1:
                held += f"== {sample.number + 1} of {options.samples}, "
                held += f"seed {options.seed + sample.number}\n"
            held += sample.shown
        held += piece.text
        if piece.last:
            held, begun = f"{held}\n", False
        if streamed or piece.last:
            show(held)
            held = ""


def _write_lines(
    options: GenerationOptions,
    pieces: Iterator[Piece[_Sample]],
    tokenizer: TextTokenizer,
) -> None:
    """A JSON object a continuation."""
    text = ""
    with lines_to(options.output or STANDARD) as write:
        for piece in pieces:
            text += piece.text
            if not piece.last:
                continue
            generated = piece.completion.generated
            line = dict(piece.item.fields)
            if options.samples > 1:
                line["sample"] = piece.item.number
            line |= {"text": text, "tokens": len(generated.tokens)}
            line["finish_reason"] = piece.completion.finish_reason
            if options.logprobs is not None:
                line["logprobs"] = [_logprobs(t, tokenizer) for t in generated.tokens]
            write(line)
            text = ""


def _logprobs(token: Token, tokenizer: TextTokenizer) -> dict[str, Any]:
    """A token and its alternatives, log-probabilities in nats."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        return {"id": id, "token": tokenizer.decode([id]), "logprob": logprob}

    likely = [entry(id, logprob) for id, logprob in token.alternatives]
    return {**entry(token.id, token.logprob), "likeliest": likely}

"""Held-out loss of a checkpoint of a run, over all rows of a token set; or benchmarks.

Prints the cross-entropy in nats a token, perplexity, and bits per byte of text, which
can be compared between tokenizers. With --tasks, the figures of lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Generator, Iterable, Sequence
from typing import Annotated, ClassVar

import numpy as np
from tqdm import tqdm

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.model import IGNORED_TARGET
from ten_dist.config.options import Options, at_least, metavar, options_of
from ten_dist.config.training import CacheOptions
from ten_dist.console import say
from ten_dist.data import (
    BatchShape,
    RemoteAccess,
    TokenBatch,
    evaluation_batches,
    token_counts,
    unigram_loss,
    verify_shards,
)
from ten_dist.data.access import access_of, load_set
from ten_dist.errors import ConfigurationError
from ten_dist.evaluation import evaluate
from ten_dist.harness.tasks import Tasks
from ten_dist.held_out_data import held_out_data, held_out_place
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import CheckpointOptions, TrainedModel

_ROWS = 8
"""Rows at once, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSetOptions(CacheOptions):
    """The token set that a loss is measured on."""

    GROUP: ClassVar[str] = "token set"

    data: Annotated[str | None, metavar("DIR|URL")] = None
    """Token shards; by default the run's validation data."""
    seq_len: Annotated[int | None, at_least(1)] = None
    """Row length; by default the run's."""
    max_rows: Annotated[int | None, at_least(1)] = None
    """Use only the first N rows; by default all."""
    unigram_baseline: bool = False
    """Also print the loss of the token frequencies of the run's training data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """The benchmarks that are run instead."""

    GROUP: ClassVar[str] = "benchmarks"

    tasks: Annotated[tuple[str, ...] | None, metavar("NAME,NAME")] = None
    """Tasks of lm-evaluation-harness, groups of them, or patterns such as arc_*, instead
    of a token set."""
    include_path: Annotated[str | None, metavar("DIR")] = None
    """Folder with task files of your own."""
    num_fewshot: Annotated[int | None, at_least(0)] = None
    """Solved examples before each question; by default each task's own number."""
    limit: Annotated[int | None, at_least(1)] = None
    """Use only the first N documents of each task; by default all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CheckpointOptions, TokenSetOptions, TaskOptions):
    """What is evaluated on; each field is an option of `ten-dist evaluate`."""

    GROUP: ClassVar[str] = ""

    batch_size: Annotated[int | None, at_least(1)] = None
    """Rows, or texts of a task, at once; by default 8 rows, or 32 texts."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def check_together(self) -> None:
        other = TokenSetOptions if self.tasks else TaskOptions
        for option in options_of(other).values():
            if getattr(self, option.name) == option.default:
                continue
            raise ConfigurationError(
                f"--{option.name} is for a token set, and --tasks for texts: leave one out"
                if self.tasks
                else f"--{option.name} has no effect without --tasks: leave it out"
            )


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist evaluate`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, EvaluationOptions)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as the options say.

    Raises:
        ConfigurationError: an option is out of range; the folder, its checkpoint or the
            data is missing, damaged, or does not fit the other two.
    """
    options = given(arguments, EvaluationOptions)
    folder = RunFolder(arguments.run)
    if options.tasks:
        _run_tasks(folder, options.tasks, options)
    else:
        _measure_loss(folder, options)


def _run_tasks(
    folder: RunFolder, names: Sequence[str], options: EvaluationOptions
) -> None:
    # First: a task that is not there is found sooner than a model is loaded.
    tasks = Tasks.load(names, options.include_path, ("--tasks", "--include_path"))
    from ten_dist.harness.run_model import RunModel

    model = RunModel(str(folder.path), options.checkpoint, options.batch_size or "auto")
    found = tasks.run(model, num_fewshot=options.num_fewshot, limit=options.limit)
    checkpoint = str(model.model.checkpoint)
    if options.json:
        say(json.dumps({"checkpoint": checkpoint, "tasks": found}))
        return
    say(f"checkpoint: {checkpoint}")
    for task, figures in found.items():
        words = [f"{name} {value:.4f}" for name, value in figures.items()]
        say(f"{task}: {', '.join(words)}")


def _measure_loss(folder: RunFolder, options: EvaluationOptions) -> None:
    record = folder.read()
    place = held_out_place(options.data, record)
    trained_on = record.data.train if options.unigram_baseline else {}
    access = access_of(options, [place, *trained_on.values()])
    manifest = held_out_data(place, record, access)
    verify_shards(manifest, 0, 1)
    seq_len = options.seq_len or record.schedule.seq_len
    model = TrainedModel.load(folder, options.checkpoint)
    batches = evaluation_batches(
        manifest,
        BatchShape(seq_len, options.batch_size or _ROWS),
        max_rows=options.max_rows,
    )
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    rows = min(manifest.rows(seq_len), options.max_rows or sys.maxsize)
    counted = _counted(batches, counts, rows)
    with contextlib.closing(counted):
        result = evaluate(model.compute_losses, counted, manifest, model.device)
    figures = {"checkpoint": str(model.checkpoint), **result.metrics()}
    if options.unigram_baseline:
        figures["unigram_loss"] = unigram_loss(
            _training_counts(trained_on, record.data.shares, access), counts
        )
    if options.json:
        say(json.dumps(figures))
        return
    say(f"checkpoint: {model.checkpoint}")
    say(f"data: {manifest.directory}, {result.tokens:,} tokens")
    say(
        f"held-out loss {result.loss:.4f} nats a token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
    )
    if options.unigram_baseline:
        say(
            f"unigram loss {figures['unigram_loss']:.4f} nats a token: token "
            "frequencies of the training data, on the same tokens"
        )


def _counted(
    batches: Iterable[TokenBatch], counts: np.ndarray, rows: int
) -> Generator[TokenBatch]:
    """The batches, under a progress bar of so many rows; adds what is scored of them to
    the counts, [vocab_size]."""
    with tqdm(
        total=rows,
        desc="evaluate",
        unit="row",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    ) as bar:
        for batch in batches:
            scored = batch.targets[batch.targets != IGNORED_TARGET].numpy()
            np.add(counts, np.bincount(scored, minlength=counts.size), out=counts)
            yield batch
            bar.update(int((batch.rows >= 0).sum()))


def _training_counts(
    places: dict[str, str], shares: dict[str, float] | None, access: RemoteAccess
) -> np.ndarray:
    """How often each token occurs in a run's training data, [vocab_size]; in a mixture,
    in a hundred million tokens of it."""
    counts = {
        name: token_counts(load_set(place, access)) for name, place in places.items()
    }
    if shares is None:
        return counts[""]
    weights = {name: 1e8 * shares[name] / counts[name].sum() for name in counts}
    return np.sum([counts[name] * weights[name] for name in counts], axis=0)

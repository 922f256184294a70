"""Held-out loss of a checkpoint of a run, over all rows of a token set.

Prints the cross-entropy in nats a token, perplexity, and bits per byte of text, which
can be compared between tokenizers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Generator, Iterable
from typing import Annotated

import numpy as np
from tqdm import tqdm

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.model import IGNORED_TARGET
from ten_dist.config.options import at_least, metavar
from ten_dist.config.training import CacheOptions
from ten_dist.console import say
from ten_dist.data import (
    BatchShape,
    Manifest,
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
from ten_dist.run_folder import RunFolder
from ten_dist.run_record import RunRecord
from ten_dist.trained_model import CheckpointOptions, TrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CheckpointOptions, CacheOptions):
    """What is evaluated on; each field is an option of `ten-dist evaluate`."""

    data: Annotated[str | None, metavar("DIR|URL")] = None
    """Token shards; by default the run's validation data."""
    seq_len: Annotated[int | None, at_least(1)] = None
    """Row length; by default the run's."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Rows at once."""
    max_rows: Annotated[int | None, at_least(1)] = None
    """Use only the first N rows; by default all."""
    unigram_baseline: bool = False
    """Also print the loss of the token frequencies of the run's training data."""
    json: bool = False
    """Print one JSON object instead of lines."""


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
    record = folder.read()
    place = _held_out_place(options.data, record)
    trained_on = record.data.train if options.unigram_baseline else {}
    access = access_of(options, [place, *trained_on.values()])
    manifest = _held_out_data(place, record, access)
    verify_shards(manifest, 0, 1)
    seq_len = options.seq_len or record.schedule.seq_len
    model = TrainedModel.load(folder, options.checkpoint)
    batches = evaluation_batches(
        manifest,
        BatchShape(seq_len, options.batch_size),
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


def _held_out_place(option: str | None, record: RunRecord) -> str:
    places = record.data.validation
    if option or "" in places:
        return option or places[""]
    if not places:
        raise ConfigurationError(
            "the run was trained without validation data: give a folder with --data"
        )
    found = ", ".join(f"{place} ({name})" for name, place in places.items())
    raise ConfigurationError(
        f"the run was trained on a mixture: say with --data which to use, {found}"
    )


def _held_out_data(place: str, record: RunRecord, access: RemoteAccess) -> Manifest:
    manifest = load_set(place, access)
    if manifest.tokenizer_sha256 != record.data.tokenizer_sha256:
        raise ConfigurationError(
            f"--data {place} was made with another tokenizer than the run's: prepare "
            "it with the tokenizer.json of the run folder"
        )
    masked = record.model.document_separator_id
    if masked not in (None, manifest.separator_id):
        raise ConfigurationError(
            f"--data {manifest.directory} ends documents with token "
            f"{manifest.separator_id}, and the run keeps documents apart by token "
            f"{masked}: prepare it with the run's --separator"
        )
    return manifest


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

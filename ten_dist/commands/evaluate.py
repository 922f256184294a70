"""Held-out loss of a run's newest checkpoint, over all rows of a token set.

Prints the cross-entropy in nats a token, perplexity, and bits per byte of text, which
can be compared between tokenizers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.console import say
from ten_dist.data import (
    Manifest,
    RemoteAccess,
    TokenBatch,
    evaluation_batches,
    token_counts,
    unigram_loss,
    verify_shards,
)
from ten_dist.data.access import access_of, add_cache_options, load_set
from ten_dist.errors import ConfigurationError
from ten_dist.evaluation import evaluate
from ten_dist.run_folder import RunFolder
from ten_dist.run_record import RunRecord
from ten_dist.trained_model import TrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist evaluate`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--data",
        metavar="DIR|URL",
        help="token shards [default: the run's validation data]",
    )
    add_cache_options(parser)
    parser.add_argument(
        "--seq_len", type=int, metavar="N", help="row length [default: the run's]"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="rows at once [default: 8]",
    )
    parser.add_argument(
        "--max_rows",
        type=int,
        metavar="N",
        help="use only the first N rows [default: all]",
    )
    parser.add_argument(
        "--unigram_baseline",
        action="store_true",
        help="also print the loss of the token frequencies of the run's training data",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as the options say.

    Raises:
        ConfigurationError: the folder, its checkpoint or the data is missing, damaged,
            or does not fit the other two.
    """
    folder = RunFolder(arguments.run)
    record = folder.read()
    place = _held_out_place(arguments.data, record)
    trained_on = record.data.train if arguments.unigram_baseline else {}
    access = access_of(arguments, [place, *trained_on.values()])
    manifest = _held_out_data(place, record, access)
    verify_shards(manifest, 0, 1)
    for name in ("batch_size", "max_rows", "seq_len"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name} must be 1 or more, not {value}")
    seq_len = arguments.seq_len or record.schedule.seq_len
    model = TrainedModel.load(folder)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)

    batches = evaluation_batches(
        manifest,
        seq_len=seq_len,
        micro_batch_size=arguments.batch_size,
        rank=0,
        world_size=1,
        max_rows=arguments.max_rows,
    )

    def counted(bar: tqdm) -> Iterator[TokenBatch]:
        for batch in batches:
            scored = batch.targets[batch.targets != IGNORED_TARGET].numpy()
            np.add(counts, np.bincount(scored, minlength=counts.size), out=counts)
            yield batch
            bar.update(int((batch.rows >= 0).sum()))

    with tqdm(
        total=min(manifest.rows(seq_len), arguments.max_rows or sys.maxsize),
        desc="evaluate",
        unit="row",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    ) as bar:
        result = evaluate(model.compute_losses, counted(bar), manifest, model.device)
    figures = {"checkpoint": str(model.checkpoint), **result.metrics()}
    if arguments.unigram_baseline:
        figures["unigram_loss"] = unigram_loss(
            _training_counts(trained_on, record.data.shares, access), counts
        )
    if arguments.json:
        say(json.dumps(figures))
        return
    say(f"checkpoint: {model.checkpoint}")
    say(f"data: {manifest.directory}, {result.tokens:,} tokens")
    say(
        f"held-out loss {result.loss:.4f} nats a token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
    )
    if arguments.unigram_baseline:
        say(
            f"unigram loss {figures['unigram_loss']:.4f} nats a token: token "
            "frequencies of the training data, on the same tokens"
        )


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
    if "" in counts:
        return counts[""]
    return sum(
        counts[name] * (1e8 * shares[name] / counts[name].sum()) for name in counts
    )

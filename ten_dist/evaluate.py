"""Held-out loss of a run's newest checkpoint, over all rows of a token set.

Prints the cross-entropy in nats a token, perplexity, and bits per byte of text, which
can be compared between tokenizers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ten_dist.config import IGNORED_TARGET
from ten_dist.data import (
    Manifest,
    RemoteAccess,
    TokenBatch,
    evaluation_batches,
    token_counts,
    unigram_loss,
    verify_shards,
)
from ten_dist.data_access import access_of, add_cache_options, load_set
from ten_dist.errors import ConfigurationError
from ten_dist.monitor.console import say
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Cross-entropy of a model on a token set."""

    loss: float
    """Mean over the tokens, nats."""
    tokens: int
    """Target tokens it is the mean of."""
    bytes_per_token: float
    """UTF-8 bytes of text a token, over the whole set."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per byte of text: comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token

    def metrics(self) -> dict[str, float]:
        """The figures under the names that metrics.jsonl uses."""
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
        }


def combine(results: Sequence[Evaluation], weights: Sequence[float]) -> Evaluation:
    """What the evaluations of several sets say of their mixture.

    Args:
        results: one of each set.
        weights: tokens of each in the mixture, relative to each other.
    """
    total = sum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total

    return Evaluation(
        loss=mean(result.loss for result in results),
        tokens=sum(result.tokens for result in results),
        bytes_per_token=mean(result.bytes_per_token for result in results),
    )


@torch.no_grad()
def evaluate(
    compute_losses: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Iterable[TokenBatch],
    manifest: Manifest,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> Evaluation:
    """Evaluate a model on batches of `manifest`.

    Args:
        compute_losses: (inputs, targets), both [B, T] on `device`, to a dict with
            `ce_loss`, the mean over targets that are not -100.
        batches: this rank's share.
        manifest: the set the batches come from.
        device: where to compute.
        sum_over_ranks: adds a tensor up over the ranks.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        targets = batch.targets.to(device)
        ce_loss = compute_losses(batch.inputs.to(device), targets)["ce_loss"]
        count = (targets != IGNORED_TARGET).sum()
        totals += torch.stack([ce_loss.double() * count, count.double()])
    loss_sum, tokens = sum_over_ranks(totals).tolist()
    return Evaluation(
        loss=loss_sum / tokens,
        tokens=int(tokens),
        bytes_per_token=manifest.text_bytes / manifest.tokens,
    )


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
    config = folder.read_config()
    place = _held_out_place(arguments.data, config)
    trained_on = _places(config["data"]["train"]) if arguments.unigram_baseline else {}
    access = access_of(arguments, [place, *trained_on.values()])
    manifest = _held_out_data(place, config, access)
    verify_shards(manifest, 0, 1)
    for name in ("batch_size", "max_rows", "seq_len"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name} must be 1 or more, not {value}")
    seq_len = arguments.seq_len or config["plan"]["seq_len"]
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
            _training_counts(trained_on, config["data"].get("shares"), access), counts
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


def _held_out_place(option: str | None, config: dict) -> str:
    folder = option or config["data"]["validation"]
    if folder is None:
        raise ConfigurationError(
            "the run was trained without validation data: give a folder with --data"
        )
    if isinstance(folder, dict):
        places = ", ".join(f"{place} ({name})" for name, place in folder.items())
        raise ConfigurationError(
            f"the run was trained on a mixture: say with --data which to use, {places}"
        )
    return folder


def _held_out_data(place: str, config: dict, access: RemoteAccess) -> Manifest:
    manifest = load_set(place, access)
    if manifest.tokenizer_sha256 != config["data"]["tokenizer_sha256"]:
        raise ConfigurationError(
            f"--data {place} was made with another tokenizer than the run's: prepare "
            "it with the tokenizer.json of the run folder"
        )
    masked = config["model"].get("document_separator_id")
    if masked not in (None, manifest.separator_id):
        raise ConfigurationError(
            f"--data {manifest.directory} ends documents with token {manifest.separator_id}, and the "
            f"run keeps documents apart by token {masked}: prepare it with the run's "
            "--separator"
        )
    return manifest


def _places(data: str | dict[str, str]) -> dict[str, str]:
    """Where the sets of a run lie, by the name of their source; "" for a single one."""
    return data if isinstance(data, dict) else {"": data}


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

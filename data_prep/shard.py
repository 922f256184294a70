"""Prepare token shards: the command, and the order in which its parts do their work."""

from __future__ import annotations

import argparse
import functools
import hashlib
import heapq
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.corpus import (
    Segment,
    Skipped,
    list_corpus,
    list_python_stdlib,
    listing_digest,
    read_documents,
    units,
)
from data_prep.options import parse_options
from data_prep.output import Output
from data_prep.ranks import Ranks, Tick
from data_prep.tokenizer import (
    Encoder,
    byte_tokenizer,
    find_separator,
    train_tokenizer,
    vocabulary_size,
)
from data_prep.writer import Split, UnitResult, is_held_out, write_unit
from ten_dist.data.manifest import Manifest, token_dtype
from ten_dist.data.tokenizer import TOKENIZER_NAME, file_sha256, load_tokenizer
from ten_dist.errors import EXIT_CONFIGURATION_ERROR, ConfigurationError

_LAYOUT = 1
"""Part of a set's source: raised when the same corpus would give other shards."""
_INTERRUPTED = 130

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the ranks must know to work; the same on each."""

    units: list[list[Segment]]
    source: dict[str, Any]
    tokenizer_json: str
    tokenizer_sha256: str
    vocab_size: int
    separator: tuple[str, int]


def main(arguments: Sequence[str] | None = None, ranks: Ranks | None = None) -> int:
    """Run the command with the given arguments, those of the process by default.

    Every rank must call it; ``ranks`` are those of MPI by default. Returns the exit
    status, the same on every rank: 0, or 2 after one line on standard error that says
    what to change.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        ranks, notice = (ranks, None) if ranks is not None else Ranks.start()
    except ConfigurationError as error:
        return _refuse(error)
    try:
        status = _run(ranks, arguments, notice)
    except ConfigurationError as error:
        status = _refuse(error) if ranks.rank == 0 else EXIT_CONFIGURATION_ERROR
    except KeyboardInterrupt:
        print("data_prep.shard: interrupted", file=sys.stderr, flush=True)
        ranks.abort(_INTERRUPTED)
    except Exception:  # noqa: BLE001 - a defect on one rank must end the others too
        traceback.print_exc()
        ranks.abort(1)
    # mpiexec kills all ranks when the first ends with an error, so first let rank 0
    # have its say.
    ranks.barrier()
    return status


def _refuse(error: ConfigurationError) -> int:
    print(f"data_prep.shard: error: {error}", file=sys.stderr, flush=True)
    return EXIT_CONFIGURATION_ERROR


def _run(ranks: Ranks, arguments: Sequence[str], notice: str | None) -> int:
    started = time.monotonic()
    say = functools.partial(_say, ranks.rank)
    options = ranks.from_root(lambda: _options(arguments))
    if options is None:
        return 0
    if notice:
        say(notice)
    output = Output(Path(options.output))
    try:
        plan = ranks.from_root(lambda: _plan(options, output, say))
        if plan is None:
            return 0
        if len(plan.units) < ranks.size:
            say(
                f"{ranks.size} ranks, but only {len(plan.units)} shards to make: the "
                "other ranks have nothing to do (--shard_megabytes makes more, smaller "
                "shards)"
            )
        results = _tokenize(ranks, options, plan, output)
        ranks.from_root(lambda: _complete(options, plan, output, results, say))
    except ConfigurationError:
        if ranks.rank == 0:
            output.abandon()
        raise
    say(f"prepared {options.output} in {time.monotonic() - started:.1f} s")
    return 0


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace | None:
    """The options; None if ``--help`` was all that was asked for."""
    try:
        return parse_options(arguments)
    except SystemExit:
        return None


def _plan(options: argparse.Namespace, output: Output, say: Say) -> Plan | None:
    """List the corpus, claim the output and get the tokenizer; None if all is done."""
    if options.corpus is not None:
        segments = list_python_stdlib(options.exclude, options.output)
    else:
        segments = list_corpus(
            options.input, options.include, options.exclude, options.output
        )
    total = sum(segment.bytes for segment in segments)
    source = _source(options, segments)
    val = options.val_fraction > 0
    prepared = output.prepared(source["sha256"], val)
    if prepared is not None:
        say(f"{options.output} is already prepared: {_summary(prepared)}")
        return None
    given = _given_tokenizer(options)
    if output.claim(val):
        say("replacing what an interrupted run left in the output folder")
    shards = units(segments, options.shard_megabytes * 1e6)
    files = len({segment.path for segment in segments})
    say(f"corpus: {files} files, {total / 1e6:.1f} MB, in {len(shards)} shards")
    if given is None:
        tokenizer = _train(options, segments, say)
        text = tokenizer.to_str(pretty=True)
    else:
        tokenizer, text = given
    encoded = text.encode("utf-8")
    for folder in [output.folder, *([output.val_folder] if val else [])]:
        (folder / TOKENIZER_NAME).write_bytes(encoded)
    return Plan(
        units=shards,
        source=source,
        tokenizer_json=text,
        tokenizer_sha256=hashlib.sha256(encoded).hexdigest(),
        vocab_size=vocabulary_size(tokenizer),
        separator=find_separator(tokenizer, options.separator),
    )


def _source(options: argparse.Namespace, segments: Sequence[Segment]) -> dict[str, Any]:
    """What decides the outcome: the corpus and the options, without machine paths."""
    tokenizer = options.tokenizer or "trained"
    if options.tokenizer not in (None, "bytes"):
        try:
            tokenizer = file_sha256(options.tokenizer)
        except OSError as error:
            raise ConfigurationError(
                f"cannot read --tokenizer {options.tokenizer}: {error.strerror}"
            ) from None
    source = {
        "layout": _LAYOUT,
        "files": len({segment.path for segment in segments}),
        "bytes": sum(segment.bytes for segment in segments),
        "listing_sha256": listing_digest(segments),
        "text_field": options.text_field,
        "val_fraction": options.val_fraction,
        "shard_megabytes": options.shard_megabytes,
        "tokenizer": tokenizer,
        "separator": options.separator,
    }
    if options.tokenizer is None:
        source["vocab_size"] = options.vocab_size
        source["tokenizer_sample_megabytes"] = options.tokenizer_sample_megabytes
    canonical = json.dumps(source, sort_keys=True, separators=(",", ":"))
    return {**source, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def _given_tokenizer(options: argparse.Namespace) -> tuple[Tokenizer, str] | None:
    """The tokenizer that is not to be trained, checked, and its JSON."""
    if options.tokenizer is None:
        return None
    if options.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
        text = tokenizer.to_str(pretty=True)
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        # Kept to the letter, so that its hash is that of the user's own file.
        text = Path(options.tokenizer).read_bytes().decode("utf-8")
    find_separator(tokenizer, options.separator)
    size = vocabulary_size(tokenizer)
    if options.vocab_size not in (None, size):
        raise ConfigurationError(
            f"--vocab_size {options.vocab_size} is not that of --tokenizer "
            f"{options.tokenizer}, {size}: leave it out"
        )
    return tokenizer, text


def _train(
    options: argparse.Namespace, segments: Sequence[Segment], say: Say
) -> Tokenizer:
    """Train on the documents that are not held out, and say how it went."""
    started = time.monotonic()
    limit = options.tokenizer_sample_megabytes * 1e6
    taken = 0

    def sample() -> Iterator[str]:
        nonlocal taken
        for segment in segments:
            for text in read_documents(segment, options.text_field, Skipped()):
                if not is_held_out(text, options.val_fraction):
                    taken += len(text.encode("utf-8"))
                    yield text
                    if taken >= limit:
                        return

    tokenizer = train_tokenizer(sample(), options.vocab_size)
    size = vocabulary_size(tokenizer)
    say(
        f"tokenizer: {size} tokens, trained on {taken / 1e6:.1f} MB in "
        f"{time.monotonic() - started:.1f} s"
    )
    if size < options.vocab_size:
        say(
            f"tokenizer: the corpus has no pairs left to merge after {size} tokens, so "
            f"the vocabulary is {size}, not --vocab_size {options.vocab_size}"
        )
    return tokenizer


def assign_units(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each unit, largest first, to the rank with the least to do so far."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(unit)
        heapq.heappush(loads, (load + sizes[unit], rank))
    return shares


def _tokenize(
    ranks: Ranks, options: argparse.Namespace, plan: Plan, output: Output
) -> list[list[UnitResult]] | None:
    """Write this rank's share of the shards; on rank 0, all ranks' results."""
    sizes = [sum(segment.bytes for segment in unit) for unit in plan.units]
    share = assign_units(sizes, ranks.size)[ranks.rank]

    def job(tick: Tick) -> list[UnitResult]:
        encoder = Encoder(plan.tokenizer_json, options.separator)
        return [
            write_unit(
                unit,
                plan.units[unit],
                output=output.folder,
                val_output=output.val_folder,
                encoder=encoder,
                dtype=token_dtype(plan.vocab_size),
                val_fraction=options.val_fraction,
                text_field=options.text_field,
                tick=tick,
            )
            for unit in share
        ]

    with tqdm(
        total=sum(sizes),
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        # In a log file each update is a line of its own.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=ranks.rank != 0,
    ) as bar:
        return ranks.work(job, bar.update)


def _complete(
    options: argparse.Namespace,
    plan: Plan,
    output: Output,
    results: list[list[UnitResult]] | None,
    say: Say,
) -> None:
    """Write the manifests, that of the train set last of all, and sum up."""
    ordered = sorted(
        (result for share in results or [] for result in share),
        key=lambda result: result.unit,
    )
    train = _manifest(output.folder, plan, [result.train for result in ordered])
    val = _manifest(output.val_folder, plan, [result.val for result in ordered])
    if train.documents + val.documents == 0:
        raise ConfigurationError(
            "the corpus has no documents: all its files are empty or not UTF-8"
        )
    if train.documents == 0 or (options.val_fraction > 0 and val.documents == 0):
        side, change = (
            ("train", "less") if train.documents == 0 else ("held-out", "more")
        )
        raise ConfigurationError(
            f"none of the {train.documents + val.documents} documents fell in the "
            f"{side} set: give a --val_fraction of {change} than "
            f"{options.val_fraction:g}, or more documents"
        )
    if options.val_fraction > 0:
        val.write()
    train.write()
    output.complete()
    say(f"train: {_summary(train)}")
    if options.val_fraction > 0:
        say(f"held out: {_summary(val)}")
    empty = sum(result.skipped.empty for result in ordered)
    not_utf8 = sum(result.skipped.not_utf8 for result in ordered)
    say(f"left out: {empty} empty documents, {not_utf8} that are not UTF-8")


def _manifest(folder: Path, plan: Plan, splits: Sequence[Split]) -> Manifest:
    token, token_id = plan.separator
    return Manifest(
        directory=folder,
        shards=tuple(split.shard for split in splits if split.shard is not None),
        documents=sum(split.documents for split in splits),
        text_bytes=sum(split.text_bytes for split in splits),
        dtype=token_dtype(plan.vocab_size),
        vocab_size=plan.vocab_size,
        tokenizer_file=TOKENIZER_NAME,
        tokenizer_sha256=plan.tokenizer_sha256,
        separator_token=token,
        separator_id=token_id,
        source=plan.source,
    )


def _summary(manifest: Manifest) -> str:
    return (
        f"{manifest.documents} documents, {manifest.text_bytes} bytes, "
        f"{manifest.tokens} tokens ({manifest.text_bytes / manifest.tokens:.2f} bytes "
        f"per token), {len(manifest.shards)} shards, vocabulary {manifest.vocab_size}"
    )


if __name__ == "__main__":
    sys.exit(main())

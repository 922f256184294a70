"""Prepare token shards: the command, and the order in which its parts do their work."""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.deduplicate import mark_duplicates
from data_prep.journal import Split, UnitResult
from data_prep.left_out import LeftOut
from data_prep.options import ShardOptions, parse_options
from data_prep.output import Found, Output
from data_prep.plan import CorpusPlan, Say, Vocabulary, make_vocabulary, plan_corpus
from data_prep.progress import work_with_bar
from data_prep.ranks import FileError, Ranks, Tick, assign_units
from data_prep.writer import write_unit
from ten_dist.data.manifest import Manifest, token_dtype
from ten_dist.data.tokenizer import TOKENIZER_NAME, TextTokenizer
from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    ConfigurationError,
)
from ten_dist.files import check_current_folder
from ten_dist.streams import prepare_streams
from ten_dist.termination import exit_status, interrupt_on_termination


def main(arguments: Sequence[str] | None = None, ranks: Ranks | None = None) -> int:
    """Run the command with the given arguments, those of the process by default.

    Every rank must call it; ``ranks`` are those of MPI by default. Returns the exit
    status, the same on every rank: 0; or, after one line on standard error that says
    why, 2 where something asked for is at fault and nothing is left behind, 1 where a
    file could not be read or written later, and what is finished is kept.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_current_folder()
        ranks, notice = (ranks, None) if ranks is not None else Ranks.start()
    except ConfigurationError as error:
        _complain(0, error)
        return EXIT_CONFIGURATION_ERROR
    try:
        status = _run(ranks, arguments, notice)
    except ConfigurationError as error:
        _complain(ranks.rank, error)
        status = EXIT_CONFIGURATION_ERROR
    except FileError as error:
        _complain(ranks.rank, error)
        status = EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        print(
            "data_prep.shard: interrupted (the same command continues)",
            file=sys.stderr,
            flush=True,
        )
        ranks.abort(exit_status(interrupt))
    except Exception:  # noqa: BLE001 - a defect on one rank must end the others too
        traceback.print_exc()
        ranks.abort(EXIT_FAILED)
    # mpiexec kills all ranks when the first ends with an error, so first let rank 0
    # have its say.
    ranks.barrier()
    return status


def _complain(rank: int, error: Exception) -> None:
    if rank == 0:
        print(f"data_prep.shard: error: {error}", file=sys.stderr, flush=True)


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
        begun = _begun(ranks, options, output, say)
        if begun is None:
            return 0
        plan, continued = begun
        if options.deduplicate:
            mark_duplicates(ranks, plan.units, plan.selection, output.journal)
        vocabulary = ranks.from_root(lambda: _vocabulary(options, plan, output, say))
        finished = _finished(ranks, plan, vocabulary, output, continued, say)
        results = _tokenize(ranks, options, plan, vocabulary, output, finished, say)
        ranks.from_root(
            lambda: _complete(options, plan, vocabulary, output, results, say)
        )
    except FileError as error:
        output.release()
        raise FileError(
            f"{error} (what is finished is kept: the same command continues)"
        ) from None
    except ConfigurationError:
        if ranks.rank == 0:
            output.abandon()
        raise
    say(f"prepared {options.output} in {time.monotonic() - started:.1f} s")
    return 0


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _options(arguments: Sequence[str]) -> ShardOptions | None:
    """The options; None if ``--help`` was all that was asked for."""
    try:
        return parse_options(arguments)
    except SystemExit:
        return None


def _begun(
    ranks: Ranks, options: ShardOptions, output: Output, say: Say
) -> tuple[CorpusPlan, bool] | None:
    """Claim the output: the plan, and whether it continues; None if all is done.

    Raises:
        ConfigurationError: something asked for is wrong, or a file of it is unreadable.
    """
    try:
        return ranks.from_root(lambda: _begin(options, output, say))
    except FileError as error:
        # Nothing is finished yet, nor written.
        raise ConfigurationError(str(error)) from None


def _begin(
    options: ShardOptions, output: Output, say: Say
) -> tuple[CorpusPlan, bool] | None:
    plan = plan_corpus(options)
    val = options.val_fraction > 0
    prepared = output.prepared(plan.source["sha256"], val)
    if prepared is None:
        if notice := output.lock():
            say(notice)
        # Another preparation may have completed it until then.
        prepared = output.prepared(plan.source["sha256"], val)
    if prepared is not None:
        output.release()
        say(f"{options.output} is already prepared: {_summary(prepared)}")
        return None
    found = output.claim(plan.identity, val)
    if found is Found.OTHER:
        say(
            f"starting over: {options.output} was begun with another corpus or with "
            "other options, and not completed"
        )
    say(plan.summary)
    return plan, found is Found.SAME


def _vocabulary(
    options: ShardOptions, plan: CorpusPlan, output: Output, say: Say
) -> Vocabulary:
    vocabulary = make_vocabulary(options, plan, output.journal, say)
    output.write_tokenizer(vocabulary.tokenizer_json, options.val_fraction > 0)
    return vocabulary


def _finished(
    ranks: Ranks,
    plan: CorpusPlan,
    vocabulary: Vocabulary,
    output: Output,
    continued: bool,
    say: Say,
) -> list[UnitResult]:
    """The units that an earlier start finished; what it left of others is removed."""
    if not continued:
        return []
    recorded = ranks.from_root(
        lambda: output.journal.units(vocabulary.tokenizer_sha256)
    )

    def job(tick: Tick) -> list[UnitResult]:
        whole = []
        for result in recorded[ranks.rank :: ranks.size]:
            if output.holds(result):
                whole.append(result)
            tick(0, 0)
        return whole

    results = ranks.work(job, lambda *_: None)

    def keep() -> list[UnitResult]:
        whole = [result for share in results or [] for result in share]
        output.keep_only(whole)
        return whole

    finished = ranks.from_root(keep)
    say(f"continuing: {len(finished)} of {len(plan.units)} shards are there")
    return finished


def _tokenize(
    ranks: Ranks,
    options: ShardOptions,
    plan: CorpusPlan,
    vocabulary: Vocabulary,
    output: Output,
    finished: Sequence[UnitResult],
    say: Say,
) -> list[UnitResult]:
    """Write this rank's share of the missing shards; on rank 0, the results of all."""
    there = {result.unit for result in finished}
    missing = [unit for unit in range(len(plan.units)) if unit not in there]
    sizes = plan.sizes
    shares = assign_units([sizes[unit] for unit in missing], ranks.size)
    if 0 < len(missing) < ranks.size:
        say(
            f"{ranks.size} ranks, but only {len(missing)} shards to make: the other "
            "ranks have nothing to do (--shard_megabytes makes more, smaller shards)"
        )

    def job(tick: Tick) -> list[UnitResult]:
        tokenizer = TextTokenizer(vocabulary.tokenizer_json, vocabulary.separator[0])
        results = []
        for unit in (missing[index] for index in shares[ranks.rank]):
            result = write_unit(
                unit,
                plan.units[unit],
                output=output.folder,
                val_output=output.val_folder,
                tokenizer=tokenizer,
                dtype=token_dtype(vocabulary.size),
                val_fraction=options.val_fraction,
                selection=plan.selection,
                duplicates=output.journal.array("duplicates", unit),
                tick=tick,
            )
            output.journal.keep_unit(result, vocabulary.tokenizer_sha256)
            results.append(result)
        return results

    there_bytes = sum(sizes[unit] for unit in there)
    results = work_with_bar(ranks, job, "tokenizing", sum(sizes), there_bytes)
    made = [result for share in results or [] for result in share]
    return sorted([*finished, *made], key=lambda result: result.unit)


def _complete(
    options: ShardOptions,
    plan: CorpusPlan,
    vocabulary: Vocabulary,
    output: Output,
    ordered: Sequence[UnitResult],
    say: Say,
) -> None:
    """Write the manifests, that of the train set last of all, and sum up."""
    trains, vals = zip(*((result.train, result.val) for result in ordered), strict=True)
    left_out = LeftOut()
    for part in (plan.left_out, *(result.left_out for result in ordered)):
        left_out.merge(part)
    left_out = plan.in_lines(left_out)
    source = {**plan.source, "left_out": left_out.summary()}
    train = _manifest(output.folder, source, vocabulary, trains)
    val = _manifest(output.val_folder, source, vocabulary, vals)
    if train.documents + val.documents == 0:
        raise ConfigurationError(
            f"the corpus has no documents: {'; '.join(left_out.lines())}"
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
    output.complete(train, val if options.val_fraction > 0 else None)
    say(f"train: {_summary(train)}")
    if options.val_fraction > 0:
        say(f"held out: {_summary(val)}")
    if not left_out.lines():
        say("left out: nothing")
    for title, lines in (("left out", left_out.lines()), ("note", left_out.notes())):
        for line in lines:
            say(f"{title}: {line}")


def _manifest(
    folder: Path,
    source: dict[str, Any],
    vocabulary: Vocabulary,
    splits: Sequence[Split],
) -> Manifest:
    token, token_id = vocabulary.separator
    return Manifest(
        directory=folder,
        shards=tuple(split.shard for split in splits if split.shard is not None),
        documents=sum(split.documents for split in splits),
        text_bytes=sum(split.text_bytes for split in splits),
        dtype=token_dtype(vocabulary.size),
        vocab_size=vocabulary.size,
        tokenizer_file=TOKENIZER_NAME,
        tokenizer_sha256=vocabulary.tokenizer_sha256,
        separator_token=token,
        separator_id=token_id,
        source=source,
    )


def _summary(manifest: Manifest) -> str:
    return (
        f"{manifest.documents} documents, {manifest.text_bytes} bytes, "
        f"{manifest.tokens} tokens ({manifest.text_bytes / manifest.tokens:.2f} bytes "
        f"per token), {len(manifest.shards)} shards, vocabulary {manifest.vocab_size}"
    )


if __name__ == "__main__":
    prepare_streams(keep_going=True)
    interrupt_on_termination()
    sys.exit(main())

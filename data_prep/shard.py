"""Prepare token shards: the command, and the order in which its parts do their work."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.conversations import Chat
from data_prep.deduplicate import mark_duplicates
from data_prep.journal import Split, UnitResult
from data_prep.left_out import LeftOut
from data_prep.options import ShardOptions, parse_options
from data_prep.output import Found, Output
from data_prep.plan import CorpusPlan, make_tokenizer, plan_corpus
from data_prep.ranks import FileError, Ranks, Tick, work_on_units
from data_prep.writer import UnitWriter
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
    options = ranks.from_root(lambda: _options(arguments))
    if options is None:
        return 0
    preparation = _Preparation(ranks, options)
    if notice:
        preparation.say(notice)
    preparation.run()
    return 0


def _options(arguments: Sequence[str]) -> ShardOptions | None:
    """The options; None if ``--help`` was all that was asked for."""
    try:
        return parse_options(arguments)
    except SystemExit:
        return None


class _Preparation:
    """What the ranks do, one thing after the other; every rank has one."""

    def __init__(self, ranks: Ranks, options: ShardOptions) -> None:
        self._ranks = ranks
        self._options = options
        self._output = Output(Path(options.output), options.val_fraction > 0)

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self._ranks.rank == 0:
            print(text, flush=True)

    def run(self) -> None:
        """Prepare the corpus, or what is missing of it.

        Raises:
            ConfigurationError: something asked for is wrong; nothing is left behind.
            FileError: a file cannot be read or written; what is finished is kept.
        """
        started = time.monotonic()
        try:
            begun = self._begun()
            if begun is None:
                return
            plan, continued = begun
            if self._options.deduplicate:
                mark_duplicates(self._ranks, plan, self._output.journal)
            content = self._ranks.from_root(lambda: self._tokenizer(plan))
            tokenizer = TextTokenizer(content, self._options.separator)
            finished = self._finished(plan, tokenizer) if continued else []
            results = self._tokenize(plan, tokenizer, finished)
            self._ranks.from_root(lambda: self._complete(plan, tokenizer, results))
        except FileError as error:
            self._output.release()
            raise FileError(
                f"{error} (what is finished is kept: the same command continues)"
            ) from None
        except ConfigurationError:
            if self._ranks.rank == 0:
                self._output.abandon()
            raise
        seconds = time.monotonic() - started
        self.say(f"prepared {self._options.output} in {seconds:.1f} s")

    def _begun(self) -> tuple[CorpusPlan, bool] | None:
        """Claim the output: the plan, and whether it continues; None if all is done.

        Raises:
            ConfigurationError: something asked for is wrong, or a file of it is
                unreadable.
        """
        try:
            return self._ranks.from_root(self._begin)
        except FileError as error:
            # Nothing is finished yet, nor written.
            raise ConfigurationError(str(error)) from None

    def _begin(self) -> tuple[CorpusPlan, bool] | None:
        plan, output = plan_corpus(self._options), self._output
        prepared = output.prepared(plan.source["sha256"])
        if prepared is None:
            if notice := output.lock():
                self.say(notice)
            # Another preparation may have completed it until then.
            prepared = output.prepared(plan.source["sha256"])
        if prepared is not None:
            output.release()
            self.say(f"{output.folder} is already prepared: {_summary(prepared)}")
            return None
        found = output.claim(plan.identity)
        if found is Found.OTHER:
            self.say(
                f"starting over: {output.folder} was begun with another corpus or with "
                "other options, and not completed"
            )
        self.say(plan.summary)
        return plan, found is Found.SAME

    def _tokenizer(self, plan: CorpusPlan) -> str:
        content = make_tokenizer(self._options, plan, self._output.journal, self.say)
        chat = plan.selection.chat
        template = None if chat is None else chat.template.source
        self._output.write_tokenizer(content, template)
        return content

    def _finished(self, plan: CorpusPlan, tokenizer: TextTokenizer) -> list[UnitResult]:
        """The units that an earlier start finished; what it left of others is removed."""
        ranks, output = self._ranks, self._output
        recorded = ranks.from_root(lambda: output.journal.units(tokenizer.sha256))

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
        self.say(f"continuing: {len(finished)} of {len(plan.units)} shards are there")
        return finished

    def _tokenize(
        self, plan: CorpusPlan, tokenizer: TextTokenizer, finished: list[UnitResult]
    ) -> list[UnitResult]:
        """Write the missing shards; on rank 0, the results of all units in order."""
        there = {result.unit for result in finished}
        missing = [unit for unit in range(len(plan.units)) if unit not in there]
        ranks, output = self._ranks, self._output
        if 0 < len(missing) < ranks.size:
            self.say(
                f"{ranks.size} ranks, but only {len(missing)} shards to make: the other "
                "ranks have nothing to do (--shard_megabytes makes more, smaller shards)"
            )
        writer = UnitWriter(
            output.folder,
            output.val_folder,
            tokenizer,
            self._options.val_fraction,
            plan.selection,
        )

        def write(unit: int, tick: Tick) -> UnitResult:
            duplicates = output.journal.array("duplicates", unit)
            result = writer.write(unit, plan.units[unit], duplicates, tick)
            output.journal.keep_unit(result, tokenizer.sha256)
            return result

        made = work_on_units(ranks, write, "tokenizing", plan.sizes, missing)
        return sorted([*finished, *made], key=lambda result: result.unit)

    def _complete(
        self, plan: CorpusPlan, tokenizer: TextTokenizer, results: Sequence[UnitResult]
    ) -> None:
        """Write the manifests, and sum up."""
        output, fraction = self._output, self._options.val_fraction
        left_out = LeftOut()
        for part in (plan.left_out, *(result.left_out for result in results)):
            left_out.merge(part)
        left_out = plan.in_lines(left_out)
        source = {**plan.source, "left_out": left_out.summary()}
        train, val = (
            _manifest(folder, source, tokenizer, splits, plan.selection.chat)
            for folder, splits in (
                (output.folder, [result.train for result in results]),
                (output.val_folder, [result.val for result in results]),
            )
        )
        documents = train.documents + val.documents
        if documents == 0:
            raise ConfigurationError(
                f"the corpus has no documents: {'; '.join(left_out.lines())}"
            )
        if train.documents == 0 or (fraction > 0 and val.documents == 0):
            side, change = (
                ("train", "less") if train.documents == 0 else ("held-out", "more")
            )
            raise ConfigurationError(
                f"none of the {documents} documents fell in the {side} set: give a "
                f"--val_fraction of {change} than {fraction:g}, or more documents"
            )
        output.complete(*([val, train] if fraction > 0 else [train]))
        self.say(f"train: {_summary(train)}")
        if fraction > 0:
            self.say(f"held out: {_summary(val)}")
        for line in left_out.lines() or ["nothing"]:
            self.say(f"left out: {line}")
        for line in left_out.notes():
            self.say(f"note: {line}")


def _manifest(
    folder: Path,
    source: dict[str, Any],
    tokenizer: TextTokenizer,
    splits: Sequence[Split],
    chat: Chat | None,
) -> Manifest:
    masked: dict[str, Any] = {}
    if chat is not None:
        counted = sum(split.counted_tokens for split in splits)
        masked = {
            "counted_tokens": counted,
            "chat_template_sha256": chat.template.sha256,
        }
    return Manifest(
        directory=folder,
        shards=tuple(split.shard for split in splits if split.shard is not None),
        documents=sum(split.documents for split in splits),
        text_bytes=sum(split.text_bytes for split in splits),
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=TOKENIZER_NAME,
        tokenizer_sha256=tokenizer.sha256,
        separator_token=tokenizer.separator,
        separator_id=tokenizer.separator_id,
        source=source,
        **masked,
    )


def _summary(manifest: Manifest) -> str:
    return (
        f"{manifest.documents} documents, {manifest.text_bytes} bytes, "
        f"{manifest.tokens} tokens ({manifest.text_bytes / manifest.tokens:.2f} bytes "
        f"per token), {len(manifest.shards)} shards, vocabulary {manifest.vocab_size}"
        + (f", {manifest.counted_tokens} tokens counted" if manifest.masked else "")
    )


if __name__ == "__main__":
    prepare_streams(keep_going=True)
    interrupt_on_termination()
    sys.exit(main())

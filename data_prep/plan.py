"""What is to be prepared, decided before work: the corpus in units, and the tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.conversations import Chat
from data_prep.corpus import (
    files_digest,
    list_corpus,
    list_files,
    list_python_stdlib,
    listing_digest,
    units,
)
from data_prep.documents import Selection, line_number, unit_documents
from data_prep.huggingface import DatasetFiles, find_dataset
from data_prep.journal import Journal
from data_prep.left_out import LeftOut, Place
from data_prep.options import ShardOptions
from data_prep.segment import Segment
from data_prep.tokenizer import BYTES_VOCAB_SIZE, train_tokenizer
from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.tokenizer import (
    SEPARATOR,
    TextTokenizer,
    byte_tokenizer,
    read_tokenizer_file,
)
from ten_dist.data.verify import CUTS_ARE_EXACT
from ten_dist.errors import ConfigurationError
from ten_dist.files import printable

_LAYOUT = CUTS_ARE_EXACT
"""Part of a set's source: raised when the same corpus would give other shards."""
_SAMPLE_EXCESS = 1 << 28
"""Bytes by which the tokenizer's sample may exceed its limit, to end with a document."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class CorpusPlan:
    """What is to be prepared; the same on every rank.

    ``source`` goes into the manifest. ``files_sha256`` says in which state the files of
    the corpus were found, which no other machine's would be in. ``left_out`` is what
    was seen to be of no use so far, by the names of files and how they begin.
    """

    units: list[list[Segment]]
    source: dict[str, Any]
    files_sha256: str
    selection: Selection
    left_out: LeftOut
    given_tokenizer: str | None

    @property
    def sizes(self) -> list[int]:
        """Bytes of the corpus in each unit."""
        return [sum(segment.bytes for segment in unit) for unit in self.units]

    @property
    def identity(self) -> dict[str, Any]:
        """By what a later start knows that it continues this."""
        return {"source": self.source, "files_sha256": self.files_sha256}

    @property
    def summary(self) -> str:
        """The corpus in one line, and one for each reason why files are not in it."""
        corpus = (
            f"corpus: {self.source['files']} files, {self.source['bytes'] / 1e6:.1f} "
            f"MB, in {len(self.units)} shards"
        )
        left_out = [f"  not in it: {line}" for line in self.left_out.lines()]
        return "\n".join([corpus, *left_out])

    def in_lines(self, left_out: LeftOut) -> LeftOut:
        """What was left out, with lines for bytes, which are what a range knows."""
        named = {
            place.file
            for places in left_out.first.values()
            for place in places
            if place.unit == "byte"
        }
        paths = {
            printable(segment.file): segment.path
            for unit in self.units
            for segment in (unit if named else ())
            if segment.format == "jsonl" and printable(segment.file) in named
        }

        def in_line(place: Place) -> Place:
            # Gone, or changed: nothing more can be said of it.
            with contextlib.suppress(OSError):
                if place.unit == "byte":
                    number = line_number(paths[place.file], place.position)
                    return place._replace(position=number, unit="line")
            return place

        return left_out.relabelled(in_line)


def plan_corpus(options: ShardOptions) -> CorpusPlan:
    """List the corpus and check the tokenizer that was asked for.

    Raises:
        ConfigurationError: there is no such corpus or tokenizer, or it does not fit.
        OSError: a file of the corpus is gone.
    """
    dataset, left_out = None, LeftOut()
    given_tokenizer = _given_tokenizer(options)
    chat = _chat(options, given_tokenizer) if options.chat else None
    text_field = None if options.chat else options.text_field
    if options.input is not None:
        segments = list_corpus(
            options.input,
            options.include,
            options.exclude,
            options.output,
            text_field,
            left_out,
        )
    elif options.dataset is not None:
        dataset = find_dataset(
            options.dataset, options.dataset_split, options.dataset_revision
        )
        segments = list_files(
            dataset.files, text_field, left_out, f"--dataset {options.dataset}"
        )
    else:
        segments = list_python_stdlib(options.exclude, options.output, left_out)
    return CorpusPlan(
        units=units(segments, options.shard_megabytes * 1e6),
        source=_source(options, segments, dataset, given_tokenizer, chat),
        files_sha256=files_digest(segments),
        selection=Selection(options.text_field, options.min_length, chat),
        left_out=left_out,
        given_tokenizer=given_tokenizer,
    )


def _source(
    options: ShardOptions,
    segments: Sequence[Segment],
    dataset: DatasetFiles | None,
    given_tokenizer: str | None,
    chat: Chat | None,
) -> dict[str, Any]:
    """What decides the outcome: the corpus and the options, without machine paths."""
    tokenizer = options.tokenizer or "trained"
    if given_tokenizer is not None and tokenizer != "bytes":
        tokenizer = hashlib.sha256(given_tokenizer.encode("utf-8")).hexdigest()
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
    # Named only where they are used, so that a set from before they existed stays itself.
    later = {
        "min_length": options.min_length,
        "dataset": dataset and dataset.source,
        "deduplicate": options.deduplicate,
        "chat_template": chat and chat.template.sha256,
    }
    source |= {name: value for name, value in later.items() if value}
    canonical = json.dumps(source, sort_keys=True, separators=(",", ":"))
    return {**source, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def _chat(options: ShardOptions, given_tokenizer: str | None) -> Chat:
    """How conversations are read: by the template that is given, beside the tokenizer, or
    the default one."""
    separator = SEPARATOR
    if given_tokenizer is not None:
        separator = TextTokenizer(given_tokenizer, options.separator).separator
    template = None
    if options.chat_template is not None:
        path = Path(options.chat_template)
        template = ChatTemplate.read(path, f"--chat_template {path}")
    elif options.tokenizer not in (None, "bytes"):
        template = ChatTemplate.beside(Path(options.tokenizer))
    return Chat(template or ChatTemplate.default(), separator)


def _given_tokenizer(options: ShardOptions) -> str | None:
    """The JSON of the tokenizer that is not to be trained, checked."""
    if options.tokenizer is None:
        if options.vocab_size is not None and options.vocab_size < BYTES_VOCAB_SIZE:
            raise ConfigurationError(
                f"--vocab_size must be at least {BYTES_VOCAB_SIZE} (256 bytes and the "
                f"separator), not {options.vocab_size}"
            )
        return None
    if options.tokenizer == "bytes":
        text = byte_tokenizer().to_str(pretty=True)
    else:
        what = f"--tokenizer {options.tokenizer}"
        advice = "give a tokenizer.json, or 'bytes'"
        text = read_tokenizer_file(options.tokenizer, what, advice)
    size = TextTokenizer(text, options.separator).vocab_size
    if options.vocab_size not in (None, size):
        raise ConfigurationError(
            f"--vocab_size {options.vocab_size} is not that of --tokenizer "
            f"{options.tokenizer}, {size}: leave it out"
        )
    return text


def make_tokenizer(
    options: ShardOptions, plan: CorpusPlan, journal: Journal, say: Say
) -> str:
    """The JSON of the tokenizer that was given, or trained by an earlier start or now.

    Raises:
        ConfigurationError: the chat template does not fit it.
        DataError: the corpus has a malformed line or has changed.
        OSError: a file cannot be read or written.
    """
    text = plan.given_tokenizer
    if text is None:
        text = journal.tokenizer()
        if text is not None:
            say("tokenizer: trained before the interruption")
        else:
            text = _train(options, plan, journal, say).to_str(pretty=True)
            journal.keep_tokenizer(text)
    tokenizer = TextTokenizer(text, options.separator)
    if plan.selection.chat is not None:
        plan.selection.chat.template.check(tokenizer)
    size, wanted = tokenizer.vocab_size, options.vocab_size
    if tokenizer.drops_unknown_characters():
        say(
            "tokenizer: it has no token for characters that it does not know, and leaves "
            "them out of the text"
        )
    if wanted is not None and size < wanted:
        say(
            f"tokenizer: the corpus has no pairs left to merge after {size} tokens, so "
            f"the vocabulary is {size}, not --vocab_size {wanted}"
        )
    return text


def _train(
    options: ShardOptions, plan: CorpusPlan, journal: Journal, say: Say
) -> Tokenizer:
    """Train on the documents that are not held out, and say how it went."""
    started = time.monotonic()
    limit = options.tokenizer_sample_megabytes * 1e6
    taken = 0

    def sample() -> Iterator[Iterator[str]]:
        for number, unit in enumerate(plan.units):
            copies = journal.array("duplicates", number)
            for document in unit_documents(
                unit, plan.selection, LeftOut(), copies, lambda *_: None
            ):
                if not document.is_held_out(options.val_fraction):
                    yield within_limit(document.pieces())
                    if taken >= limit:
                        return

    def within_limit(pieces: Iterator[str]) -> Iterator[str]:
        nonlocal taken
        for piece in pieces:
            taken += len(piece.encode("utf-8"))
            yield piece
            # A document is taken to its end, unless that is very far off.
            if taken >= limit + _SAMPLE_EXCESS:
                return

    # The options say so: it is needed where no tokenizer is given.
    assert options.vocab_size is not None
    tokenizer = train_tokenizer(sample(), options.vocab_size)
    say(
        f"tokenizer: {tokenizer.get_vocab_size()} tokens, trained on "
        f"{taken / 1e6:.1f} MB in {time.monotonic() - started:.1f} s"
    )
    return tokenizer

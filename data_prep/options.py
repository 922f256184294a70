"""The options of ``data_prep.shard``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NoReturn

from ten_dist.arguments import ArgumentParser, check_text
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import (
    REPEATED,
    SEVERAL_WORDS,
    Options,
    at_least,
    metavar,
    more_than,
)
from ten_dist.config_file import add_config_file, config_text
from ten_dist.console import say
from ten_dist.errors import ConfigurationError

DESCRIPTION = """\
Turn text into token shards for training: documents -> tokenizer -> webdataset tar
shards and a manifest. Run it under MPI,

  mpiexec -n N python -m mpi4py -m data_prep.shard --input DIR --output DIR ...

or as one process, python -m data_prep.shard ...; the result is the same to the byte.
A document is a text file, a line of JSON Lines (.jsonl, .ndjson, .jsonlines, and .json
that is that), or a row of a .parquet file. Text and JSON Lines may be compressed with
gzip, zstandard, bzip2 or xz, whatever their names say. What is not used is counted by
reason, and the first of each named. Over several machines, --input and --output must be
on a file system that all of them share.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """Which documents are taken."""

    GROUP: ClassVar[str] = "corpus"
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("input", "corpus", "dataset")

    input: Annotated[tuple[str, ...] | None, SEVERAL_WORDS, metavar("PATH")] = None
    """Files of text, JSON Lines or Parquet, and folders, which are searched recursively,
    but for hidden folders and links to folders."""
    corpus: Literal["python-stdlib"] | None = None
    """Instead of --input: the library sources of the running Python."""
    dataset: Annotated[str | None, metavar("NAME[:CONFIG]")] = None
    """Instead of --input: a Hugging Face data set of Parquet or JSON Lines, by its name on
    the Hub, from where it is fetched into the cache of huggingface_hub (HF_HOME, which all
    ranks must share), or a folder that holds one; needs the extra 'huggingface'."""
    dataset_split: str | None = None
    """Split of --dataset; by default train."""
    dataset_revision: str | None = None
    """Branch, tag or commit of --dataset; a commit stays the same when the data set is
    changed on the Hub. By default its newest state."""
    include: Annotated[tuple[str, ...], REPEATED, metavar("PATTERN")] = ()
    """Take from folders only what matches, such as '*.py'; may be repeated. By default the
    usual extensions of text and source code, JSON Lines and Parquet."""
    exclude: Annotated[tuple[str, ...], REPEATED, metavar("PATTERN")] = ()
    """Leave out files, and folders, that match; may be repeated."""
    text_field: str = "text"
    """Field of a JSONL line, or column of a Parquet file, that holds the document."""
    chat: bool = False
    """Read conversations from JSON Lines: each line has messages, a list of objects with
    role and content, or prompt and completion, each text or such a list. The shards get a
    loss mask that counts what the assistant says. Needs the extra 'chat'."""
    chat_template: Annotated[str | None, metavar("FILE")] = None
    """Template of --chat in Jinja2, or a tokenizer_config.json that has one; by default that
    beside --tokenizer FILE, or an own one."""
    val_fraction: Annotated[float, at_least(0, below=1), metavar("F")] = 0.0
    """Share of the documents, 0 <= F < 1, held out into OUTPUT/val; which ones depends on
    their text alone. Without it there is no held-out set."""
    deduplicate: bool = False
    """Leave out documents whose text is exactly that of an earlier one; reads the corpus
    once more, and takes 24 bytes of memory on one rank, and 16 bytes of disk until the
    end, for each document."""
    min_length: Annotated[int, at_least(0)] = 0
    """Leave out documents of fewer than N characters."""

    def check_together(self) -> None:
        if self.input is None and self.corpus is None and self.dataset is None:
            raise ConfigurationError("give one of --input, --corpus and --dataset")
        if self.dataset is not None and (self.include or self.exclude):
            raise ConfigurationError(
                "--include and --exclude have no effect with --dataset: leave them out"
            )
        if self.chat and self.corpus is not None:
            raise ConfigurationError(
                f"--chat reads conversations, --corpus {self.corpus} has none: give "
                "--input or --dataset"
            )
        if self.chat_template is not None and not self.chat:
            raise ConfigurationError("--chat_template has an effect only with --chat")
        for name in ("dataset_split", "dataset_revision"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ConfigurationError(f"--{name} has an effect only with --dataset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions(Options):
    """How text becomes tokens."""

    GROUP: ClassVar[str] = "tokenizer"

    vocab_size: Annotated[int | None, metavar("V")] = None
    """Tokens of the byte-level BPE to train, at least 257; needed unless --tokenizer is
    given, which it must then match."""
    tokenizer: Annotated[str | None, metavar("FILE|bytes")] = None
    """A tokenizer.json to use, or 'bytes' for one token a byte; by default one is trained
    on the documents that are not held out."""
    separator: Annotated[str | None, metavar("TOKEN")] = None
    """Token of --tokenizer FILE that ends each document; by default the only one
    that it has of the well-known ones, such as <|endoftext|> or </s>."""
    tokenizer_sample_megabytes: Annotated[float, more_than(0), metavar("M")] = 32.0
    """Train the tokenizer on the first M MB of the shuffled corpus."""

    def check_together(self) -> None:
        if self.tokenizer is None and self.vocab_size is None:
            raise ConfigurationError(
                "--vocab_size is needed to train a tokenizer (or give --tokenizer FILE "
                "or --tokenizer bytes)"
            )
        if self.separator is not None and self.tokenizer in (None, "bytes"):
            raise ConfigurationError(
                "--separator has an effect only with --tokenizer FILE"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where shards go, and how large they are."""

    GROUP: ClassVar[str] = "output"

    output: Annotated[str, metavar("DIR")]
    """New or empty folder for shards, tokenizer.json and manifest.json."""
    shard_megabytes: Annotated[float, more_than(0), metavar("M")] = 32.0
    """Corpus, in MB, that goes into one shard; ranks share the work by the shard. A text
    file or a compressed file, counted as on the disk, is not divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOptions(CorpusOptions, TokenizerOptions, OutputOptions):
    """All options of the command."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")


def parse_options(arguments: Sequence[str]) -> ShardOptions:
    """Read the command line.

    Raises:
        ConfigurationError: an argument is missing, unknown, or out of range.
        SystemExit: ``--help`` or ``--print_config`` was asked for, and printed.
    """
    check_text(arguments)
    namespace = make_parser().parse_args(arguments)
    options = given(namespace, ShardOptions)
    if namespace.print_config:
        say(config_text(namespace).rstrip())
        raise SystemExit(0)
    return options


def make_parser() -> ArgumentParser:
    """The parser of the command, with all of its options."""
    parser = _Parser(
        prog="data_prep.shard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, ShardOptions)
    add_config_file(parser)
    return parser

"""The command line of ``data_prep.shard``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from ten_dist.arguments import ArgumentParser, check_text
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


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigurationError: an argument is missing, unknown, or out of range.
        SystemExit: ``--help`` was asked for, and printed.
    """
    check_text(arguments)
    options = make_parser().parse_args(arguments)
    given = [options.input, options.corpus, options.dataset]
    if sum(value is not None for value in given) != 1:
        raise ConfigurationError("give one of --input, --corpus and --dataset")
    if options.dataset is not None and (options.include or options.exclude):
        raise ConfigurationError(
            "--include and --exclude have no effect with --dataset: leave them out"
        )
    for name in ("dataset_split", "dataset_revision"):
        if options.dataset is None and getattr(options, name) is not None:
            raise ConfigurationError(f"--{name} has an effect only with --dataset")
    _check_number(
        options.val_fraction, "--val_fraction", 0.0 <= options.val_fraction < 1.0
    )
    for name in ("shard_megabytes", "tokenizer_sample_megabytes"):
        value = getattr(options, name)
        _check_number(value, f"--{name}", value > 0)
    _check_number(options.min_length, "--min_length", options.min_length >= 0)
    if options.tokenizer is None and options.vocab_size is None:
        raise ConfigurationError(
            "--vocab_size is needed to train a tokenizer (or give --tokenizer FILE or "
            "--tokenizer bytes)"
        )
    if options.separator is not None and options.tokenizer in (None, "bytes"):
        raise ConfigurationError("--separator has an effect only with --tokenizer FILE")
    return options


def _check_number(value: float, option: str, in_range: bool) -> None:
    if not (math.isfinite(value) and in_range):
        raise ConfigurationError(f"{option} {value:g} is out of range (see --help)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command, with all of its options."""
    parser = _Parser(
        prog="data_prep.shard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files of text, JSON Lines or Parquet, and folders, which are searched "
        "recursively, but for hidden folders and links to folders",
    )
    corpus.add_argument(
        "--corpus",
        choices=["python-stdlib"],
        help="instead of --input: the library sources of the running Python",
    )
    corpus.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG]",
        help="instead of --input: a Hugging Face data set of Parquet or JSON Lines, by "
        "its name on the Hub, from where it is fetched into the cache of huggingface_hub "
        "(HF_HOME, which all ranks must share), or a folder that holds one; needs the "
        "extra 'huggingface'",
    )
    corpus.add_argument(
        "--dataset_split",
        metavar="NAME",
        help="split of --dataset (default: train)",
    )
    corpus.add_argument(
        "--dataset_revision",
        metavar="NAME",
        help="branch, tag or commit of --dataset; a commit stays the same when the data "
        "set is changed on the Hub (default: its newest state)",
    )
    corpus.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="take from folders only what matches, such as '*.py'; may be repeated "
        "(default: the usual extensions of text and source code, JSON Lines and Parquet)",
    )
    corpus.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files, and folders, that match; may be repeated (default: none)",
    )
    corpus.add_argument(
        "--text_field",
        default="text",
        metavar="NAME",
        help="field of a JSONL line, or column of a Parquet file, that holds the "
        "document (default: %(default)s)",
    )
    corpus.add_argument(
        "--val_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the documents, 0 <= F < 1, held out into OUTPUT/val; which ones "
        "depends on their text alone (default: %(default)s, no held-out set)",
    )
    corpus.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out documents whose text is exactly that of an earlier one; reads "
        "the corpus once more, and takes 24 bytes of memory on one rank, and 16 bytes "
        "of disk until the end, for each document (default: keep them)",
    )
    corpus.add_argument(
        "--min_length",
        type=int,
        default=0,
        metavar="N",
        help="leave out documents of fewer than N characters (default: %(default)s)",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--vocab_size",
        type=int,
        metavar="V",
        help="tokens of the byte-level BPE to train, at least 257; needed unless "
        "--tokenizer is given, which it must then match (default: none)",
    )
    tokenizer.add_argument(
        "--tokenizer",
        metavar="FILE|bytes",
        help="a tokenizer.json to use, or 'bytes' for one token a byte (default: train "
        "one on the documents that are not held out)",
    )
    tokenizer.add_argument(
        "--separator",
        metavar="TOKEN",
        help="token of --tokenizer FILE that ends each document (default: the first of "
        "the well-known ones that it has, such as <|endoftext|> or </s>)",
    )
    tokenizer.add_argument(
        "--tokenizer_sample_megabytes",
        type=float,
        default=32.0,
        metavar="M",
        help="train the tokenizer on the first M MB of the shuffled corpus "
        "(default: %(default)g)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new or empty folder for shards, tokenizer.json and manifest.json",
    )
    output.add_argument(
        "--shard_megabytes",
        type=float,
        default=32.0,
        metavar="M",
        help="corpus, in MB, that goes into one shard; ranks share the work by the shard; "
        "a text file or a compressed file, counted as on the disk, is not divided "
        "(default: %(default)g)",
    )
    return parser

"""The corpus: which files, cut into which segments, joined into which units.

A segment is a whole text file, a range of lines of a JSONL file, a whole compressed
JSONL file, or a row group of a Parquet file. Segments are put in
an order that depends only on what they are called within the corpus, and joined in that
order into units of about equal size: the shards. Neither the order nor the units depend
on where the corpus lies or on how many ranks work on it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.formats import check_library, parquet_row_groups
from ten_dist.errors import ConfigurationError

JSONL_RANGE_BYTES = 1 << 20
TEXT_NAME = re.compile(
    r".*\.(jsonl|jsonl\.gz|jsonl\.zst|parquet"
    r"|txt|text|md|markdown|rst|tex|org|adoc|html|htm|xml|css|scss"
    r"|py|pyi|pyx|ipynb|c|h|cc|cpp|cxx|hpp|hh|cu|cuh|m|mm|java|kt|scala|gradle|cs|fs"
    r"|go|rs|zig|nim|swift|dart|js|jsx|mjs|ts|tsx|rb|php|pl|pm|lua|tcl|r|jl|f|f90"
    r"|hs|ml|mli|ex|exs|erl|clj|lisp|el|vim|asm|s|v|sv|vhd|sol"
    r"|sh|bash|zsh|fish|ps1|sql|proto|thrift|cmake|mk|toml|ini|cfg|conf|yaml|yml)",
    re.IGNORECASE,
)
"""Names of the files that are taken from a folder when no pattern says otherwise."""
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
"""Formats by the end of a file's name; whatever ends otherwise is "text"."""
STDLIB_INCLUDE = ("*.py",)
STDLIB_EXCLUDE = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes ``start`` to ``stop`` of a file in one of :data:`FORMATS`, or "text".

    ``identity`` names it within the corpus, whatever machine that lies on. Of a JSONL
    file it holds the lines that begin in the range; of a Parquet file, ``row_group``,
    and the bytes are those of the text column; of any other it is all.
    """

    identity: str
    path: str
    start: int
    stop: int
    format: str
    row_group: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def list_corpus(
    inputs: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: str | None = None,
    text_field: str = "text",
) -> list[Segment]:
    """The segments of files and folders, in the order in which they become tokens.

    Folders are searched recursively, hidden ones and ``output`` excepted, for text and
    JSONL files by their extension, or for ``include`` patterns where given; a file
    named itself is taken whatever its extension. ``exclude`` patterns apply to both. A
    file that is reached twice counts once.

    Raises:
        ConfigurationError: an input is missing or cannot be read, an ``include``
            pattern matches nothing that is not excluded, nothing is left, a Parquet file has
            no column ``text_field`` of text, or a library is not installed.
    """
    unmatched = set(include)
    skipped_folder = os.path.realpath(output) if output else None
    found: dict[str, tuple[str, str]] = {}
    for name in inputs:
        named = os.path.isfile(name)
        for relative, path in _files(name, exclude, skipped_folder):
            matched = [pattern for pattern in include if _matches(relative, pattern)]
            unmatched.difference_update(matched)
            if named or (matched if include else TEXT_NAME.fullmatch(relative)):
                found.setdefault(os.path.realpath(path), (relative, path))
    if unmatched:
        raise ConfigurationError(
            f"--include {min(unmatched)!r} matches no file in {' '.join(inputs)}"
            + (" that --exclude leaves" if exclude else "")
        )
    segments = list_files(found.values(), text_field)
    if not segments:
        raise ConfigurationError(
            f"no text was found in {' '.join(inputs)}: give other --input, or --include "
            "patterns for the files that hold text"
        )
    return segments


def list_files(files: Iterable[tuple[str, str]], text_field: str) -> list[Segment]:
    """The segments of files, in the order in which they become tokens.

    Args:
        files: (name within the corpus, path) of each.
        text_field: column of the Parquet files that holds the text.

    Raises:
        ConfigurationError: a file cannot be read, a Parquet file has no column
            ``text_field`` of text, or a library is not installed.
    """
    segments = _segments(files, text_field)
    return sorted(segments, key=lambda segment: (_order(segment), segment.identity))


def list_python_stdlib(
    exclude: Sequence[str] = (), output: str | None = None
) -> list[Segment]:
    """The segments of the standard library sources of the running Python.

    Raises:
        ConfigurationError: this Python has no library sources.
    """
    folder = sysconfig.get_path("stdlib")
    return list_corpus([folder], STDLIB_INCLUDE, (*STDLIB_EXCLUDE, *exclude), output)


def listing_digest(segments: Sequence[Segment]) -> str:
    """sha256, in hex, of what the segments are called and how large they are."""
    digest = hashlib.sha256()
    for segment in segments:
        # Plain text and JSONL are told apart as they were before there were others.
        plain = segment.format in ("text", "jsonl")
        kind = segment.format == "jsonl" if plain else segment.format
        line = [segment.identity, segment.start, segment.stop, kind]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def files_digest(segments: Sequence[Segment]) -> str:
    """sha256, in hex, of when each file was changed last.

    It tells a corpus that was edited between two starts of a preparation, which the
    names and sizes of its files may not show.
    """
    digest = hashlib.sha256()
    names = {segment.path: segment.identity for segment in reversed(segments)}
    for path, name in sorted(names.items(), key=lambda item: item[1]):
        line = [name, os.stat(path).st_mtime_ns]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def units(segments: Sequence[Segment], unit_bytes: float) -> list[list[Segment]]:
    """Group segments, in order, into units of about ``unit_bytes`` of equal size."""
    total = sum(segment.bytes for segment in segments)
    count = max(1, round(total / unit_bytes))
    groups: dict[int, list[Segment]] = {}
    position = 0
    for segment in segments:
        group = min(position * count // max(total, 1), count - 1)
        groups.setdefault(group, []).append(segment)
        position += segment.bytes
    return list(groups.values())


def _files(
    name: str, exclude: Sequence[str], skipped_folder: str | None
) -> Iterator[tuple[str, str]]:
    """(path relative to the input, path) of the regular files of an input, but for those
    that ``exclude`` matches."""
    if os.path.isfile(name):
        relative = os.path.basename(name)
        if not _matches_any(relative, exclude):
            yield relative, name
        return
    if not os.path.isdir(name):
        reason = "is not a file or folder" if os.path.lexists(name) else "is missing"
        raise ConfigurationError(f"--input {name} {reason}")

    def refuse(error: OSError) -> None:
        raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(name, onerror=refuse):
        # An excluded folder is not entered: it may hold far more files than all others.
        folders[:] = [
            entry
            for entry in sorted(folders)
            if not entry.startswith(".")
            and not any(fnmatch.fnmatchcase(entry, pattern) for pattern in exclude)
            and os.path.realpath(os.path.join(folder, entry)) != skipped_folder
        ]
        below = Path(os.path.relpath(folder, name)).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for file in sorted(files):
            path = os.path.join(folder, file)
            relative = prefix + file
            if not _matches_any(relative, exclude) and os.path.isfile(path):
                yield relative, path


def _matches_any(relative: str, patterns: Sequence[str]) -> bool:
    return any(_matches(relative, pattern) for pattern in patterns)


def _matches(relative: str, pattern: str) -> bool:
    """Whether a pattern matches the path, the file's name, or a folder on the way."""
    parts = relative.split("/")
    return fnmatch.fnmatchcase(relative, pattern) or any(
        fnmatch.fnmatchcase(part, pattern) for part in parts
    )


def _segments(files: Iterable[tuple[str, str]], text_field: str) -> list[Segment]:
    segments = []
    uses: dict[str, int] = {}
    for relative, path in files:
        # Two inputs can hold files of one name: the second is called name#2.
        uses[relative] = uses.get(relative, 0) + 1
        identity = relative if uses[relative] == 1 else f"{relative}#{uses[relative]}"
        if not os.access(path, os.R_OK):
            raise ConfigurationError(f"cannot read {path}: permission denied")
        size = os.path.getsize(path)
        ends = [name for name in FORMATS if relative.lower().endswith(f".{name}")]
        file_format = ends[0] if ends else "text"
        check_library(file_format, path)
        if file_format == "jsonl":
            for start in range(0, size, JSONL_RANGE_BYTES):
                stop = min(start + JSONL_RANGE_BYTES, size)
                named = f"{identity}@{start}"
                segments.append(Segment(named, path, start, stop, file_format))
        elif file_format == "parquet":
            start = 0
            for group, column in enumerate(parquet_row_groups(path, text_field)):
                named = f"{identity}@{group}"
                segments.append(
                    Segment(named, path, start, start + column, file_format, group)
                )
                start += column
        else:
            segments.append(Segment(identity, path, 0, size, file_format))
    return segments


def _order(segment: Segment) -> bytes:
    name = segment.identity.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16, person=b"ten_dist.order").digest()

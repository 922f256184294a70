"""The corpus: which files, cut into which segments, holding which documents.

A segment is a whole text file, or a range of lines of a JSONL file. Segments are put in
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

from data_prep.journal import Skipped
from ten_dist.errors import ConfigurationError, DataError

JSONL_RANGE_BYTES = 1 << 20
TEXT_NAME = re.compile(
    r".*\.(jsonl"
    r"|txt|text|md|markdown|rst|tex|org|adoc|html|htm|xml|css|scss"
    r"|py|pyi|pyx|ipynb|c|h|cc|cpp|cxx|hpp|hh|cu|cuh|m|mm|java|kt|scala|gradle|cs|fs"
    r"|go|rs|zig|nim|swift|dart|js|jsx|mjs|ts|tsx|rb|php|pl|pm|lua|tcl|r|jl|f|f90"
    r"|hs|ml|mli|ex|exs|erl|clj|lisp|el|vim|asm|s|v|sv|vhd|sol"
    r"|sh|bash|zsh|fish|ps1|sql|proto|thrift|cmake|mk|toml|ini|cfg|conf|yaml|yml)",
    re.IGNORECASE,
)
"""Names of the files that are taken from a folder when no pattern says otherwise."""
STDLIB_INCLUDE = ("*.py",)
STDLIB_EXCLUDE = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Segment:
    """Bytes ``start`` to ``stop`` of a file.

    ``identity`` names it within the corpus, whatever machine that lies on. Of a JSONL
    file it holds the lines that begin in the range; of a text file it is all.
    """

    identity: str
    path: str
    start: int
    stop: int
    jsonl: bool

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def list_corpus(
    inputs: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: str | None = None,
) -> list[Segment]:
    """The segments of files and folders, in the order in which they become tokens.

    Folders are searched recursively, hidden ones and ``output`` excepted, for text and
    JSONL files by their extension, or for ``include`` patterns where given; a file
    named itself is taken whatever its extension. ``exclude`` patterns apply to both. A
    file that is reached twice counts once.

    Raises:
        ConfigurationError: an input is missing or cannot be read, a pattern is empty or
            an ``include`` pattern matches nothing, or nothing is left.
    """
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        if not all(patterns):
            raise ConfigurationError(f"{option} has an empty pattern")
    unmatched = set(include)
    skipped_folder = os.path.realpath(output) if output else None
    found: dict[str, tuple[str, str]] = {}
    for name in inputs:
        named = os.path.isfile(name)
        for relative, path in _files(name, skipped_folder):
            matched = [pattern for pattern in include if _matches(relative, pattern)]
            unmatched.difference_update(matched)
            wanted = matched if include else TEXT_NAME.fullmatch(relative)
            if not (named or wanted):
                continue
            if any(_matches(relative, pattern) for pattern in exclude):
                continue
            found.setdefault(os.path.realpath(path), (relative, path))
    if unmatched:
        raise ConfigurationError(
            f"--include {min(unmatched)!r} matches no file in {' '.join(inputs)}"
        )
    segments = _segments(found.values())
    if not segments:
        raise ConfigurationError(
            f"no text was found in {' '.join(inputs)}: give other --input, or --include "
            "patterns for the files that hold text"
        )
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
        line = [segment.identity, segment.start, segment.stop, segment.jsonl]
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


def read_documents(
    segment: Segment, text_field: str, skipped: Skipped
) -> Iterator[str]:
    """The documents of a segment, in order; those left out are added to ``skipped``.

    Raises:
        DataError: a JSONL line is malformed or lacks the field, named as file:line; or
            the file is not what was listed.
        OSError: the file cannot be read.
    """
    texts = _jsonl_texts(segment, text_field) if segment.jsonl else _file_text(segment)
    for text in texts:
        if text is None:
            skipped.not_utf8 += 1
        elif not text.strip():
            skipped.empty += 1
        else:
            yield text


def _file_text(segment: Segment) -> Iterator[str | None]:
    with open(segment.path, "rb") as file:
        data = file.read()
    if len(data) != segment.stop:
        raise DataError(f"{segment.path} changed while it was being prepared")
    try:
        yield data.decode("utf-8")
    except UnicodeDecodeError:
        yield None


def _jsonl_texts(segment: Segment, text_field: str) -> Iterator[str | None]:
    with open(segment.path, "rb") as file:
        position = segment.start
        if position:
            # The line that reaches into this range began in an earlier one.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < segment.stop and (line := file.readline()):
            begin = position
            position += len(line)
            if begin == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _line_text(line, segment.path, begin, text_field)


def _line_text(line: bytes, path: str, begin: int, text_field: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise DataError(
            f"{_place(path, begin)}: not a line of JSON ({reason})"
        ) from None
    if not isinstance(record, dict) or text_field not in record:
        raise DataError(
            f"{_place(path, begin)}: no field {text_field!r}: give the field that holds "
            "the text with --text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{_place(path, begin)}: field {text_field!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return text


def _place(path: str, offset: int) -> str:
    with open(path, "rb") as file:
        number, left = 1, offset
        while left and (chunk := file.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}:{number}"


def _files(name: str, skipped_folder: str | None) -> Iterator[tuple[str, str]]:
    """(path relative to the input, path) of every regular file of one input."""
    if os.path.isfile(name):
        yield os.path.basename(name), name
        return
    if not os.path.isdir(name):
        reason = "is not a file or folder" if os.path.lexists(name) else "is missing"
        raise ConfigurationError(f"--input {name} {reason}")

    def refuse(error: OSError) -> None:
        raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(name, onerror=refuse):
        folders[:] = [
            entry
            for entry in sorted(folders)
            if not entry.startswith(".")
            and os.path.realpath(os.path.join(folder, entry)) != skipped_folder
        ]
        for file in sorted(files):
            path = os.path.join(folder, file)
            if os.path.isfile(path):
                yield Path(os.path.relpath(path, name)).as_posix(), path


def _matches(relative: str, pattern: str) -> bool:
    """Whether a pattern matches the path, the file's name, or a folder on the way."""
    parts = relative.split("/")
    return fnmatch.fnmatchcase(relative, pattern) or any(
        fnmatch.fnmatchcase(part, pattern) for part in parts
    )


def _segments(files: Iterable[tuple[str, str]]) -> list[Segment]:
    segments = []
    uses: dict[str, int] = {}
    for relative, path in files:
        # Two inputs can hold files of one name: the second is called name#2.
        uses[relative] = uses.get(relative, 0) + 1
        identity = relative if uses[relative] == 1 else f"{relative}#{uses[relative]}"
        if not os.access(path, os.R_OK):
            raise ConfigurationError(f"cannot read {path}: permission denied")
        size = os.path.getsize(path)
        if not relative.lower().endswith(".jsonl"):
            segments.append(Segment(identity, path, 0, size, jsonl=False))
            continue
        for start in range(0, size, JSONL_RANGE_BYTES):
            stop = min(start + JSONL_RANGE_BYTES, size)
            named = f"{identity}@{start}"
            segments.append(Segment(named, path, start, stop, jsonl=True))
    return segments


def _order(segment: Segment) -> bytes:
    name = segment.identity.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16, person=b"ten_dist.order").digest()

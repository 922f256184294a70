"""The corpus: which files, cut into which segments, joined into which units.

A segment is a whole text file, a range of lines of a JSONL file, a whole compressed
JSONL file, or a row group of a Parquet file. Segments are put in an order that depends
only on what they are called within the corpus, and joined in that order into units of
about equal size: the shards. Neither the order nor the units depend on where the corpus
lies or on how many ranks work on it. What is not taken is counted, and named.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.contents import look_inside, not_text
from data_prep.formats import parquet_row_groups
from data_prep.left_out import LeftOut, Unusable
from data_prep.segment import Segment
from ten_dist.errors import ConfigurationError
from ten_dist.files import printable

JSONL_RANGE_BYTES = 1 << 20
_COMPRESSED = r"(\.(gz|gzip|zst|zstd|bz2|xz))?"
JSON_NAME = re.compile(
    rf".*\.(jsonl|ndjson|jsonlines|json){_COMPRESSED}", re.IGNORECASE | re.DOTALL
)
"""Names of JSON Lines, or, those in ``.json``, of what may be that."""
PARQUET_NAME = re.compile(r".*\.parquet", re.IGNORECASE | re.DOTALL)
TEXT_NAME = re.compile(
    r".*\.(txt|text|md|markdown|rst|tex|org|adoc|html|htm|xml|css|scss"
    r"|py|pyi|pyx|ipynb|c|h|cc|cpp|cxx|hpp|hh|cu|cuh|m|mm|java|kt|scala|gradle|cs|fs"
    r"|go|rs|zig|nim|swift|dart|js|jsx|mjs|ts|tsx|rb|php|pl|pm|lua|tcl|r|jl|f|f90"
    r"|hs|ml|mli|ex|exs|erl|clj|lisp|el|vim|asm|s|v|sv|vhd|sol"
    r"|sh|bash|zsh|fish|ps1|sql|proto|thrift|cmake|mk|toml|ini|cfg|conf|yaml|yml)"
    + _COMPRESSED,
    re.IGNORECASE | re.DOTALL,
)
"""Names of the other files that are taken from a folder when no pattern says otherwise."""
STDLIB_INCLUDE = ("*.py",)
STDLIB_EXCLUDE = ("site-packages", "dist-packages", "__pycache__")


def list_corpus(
    inputs: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    output: str | None,
    text_field: str | None,
    left_out: LeftOut,
) -> list[Segment]:
    """The segments of files and folders, in the order in which they become tokens.

    Folders are searched recursively, hidden ones, links and ``output`` excepted, for
    text, JSON Lines and Parquet by the ends of their names, or for ``include`` patterns
    where given; a file named itself is taken whatever its name. ``exclude`` patterns
    apply to both. A file that is reached twice counts once. What is not taken is added
    to ``left_out``.

    Raises:
        ConfigurationError: an input is missing or cannot be read, an ``include`` pattern
            matches nothing that is not excluded; or as :func:`list_files`.
    """
    unmatched = set(include)
    skipped_folder = os.path.realpath(output) if output else None
    alone = {os.path.realpath(name) for name in inputs if os.path.isfile(name)}
    found: dict[str, tuple[str, str]] = {}
    for name in inputs:
        named = os.path.isfile(name)
        for relative, path in _files(name, exclude, skipped_folder, left_out):
            matched = [pattern for pattern in include if _matches(relative, pattern)]
            unmatched.difference_update(matched)
            real_path = os.path.realpath(path)
            if named or (matched if include else _is_taken(relative)):
                if found.setdefault(real_path, (relative, path)) != (relative, path):
                    left_out.add_file("repeated", relative)
            elif real_path not in alone:
                reason = "not_included" if include else "unknown_name"
                left_out.add_file(reason, relative)
    if unmatched:
        raise ConfigurationError(
            f"--include {min(unmatched)!r} matches no file in {' '.join(inputs)}"
            + (" that --exclude leaves" if exclude else "")
        )
    return list_files(found.values(), text_field, left_out, " ".join(inputs))


def list_files(
    files: Iterable[tuple[str, str]],
    text_field: str | None,
    left_out: LeftOut,
    source: str,
) -> list[Segment]:
    """The segments of files, in the order in which they become tokens.

    Args:
        files: (name within the corpus, path) of each.
        text_field: field of JSON Lines and column of Parquet that holds the text; None
            of conversations, which only JSON Lines hold.
        left_out: where files that hold nothing to read are counted.
        source: where they come from, as the user named it.

    Raises:
        ConfigurationError: a file cannot be read, a Parquet file has no column
            ``text_field`` of text, a library is not installed, or no file has anything
            to read.
    """
    segments: list[Segment] = []
    uses: Counter[str] = Counter()
    for relative, path in files:
        # Two inputs can hold files of one name: the second is called name#2.
        uses[relative] += 1
        identity = relative if uses[relative] == 1 else f"{relative}#{uses[relative]}"
        if not os.access(path, os.R_OK):
            raise ConfigurationError(
                f"cannot read {printable(path)}: permission denied"
            )
        found = _segments(relative, identity, path, text_field)
        if isinstance(found, Unusable):
            left_out.add_file(found.reason, identity, found.note)
        else:
            segments += found
    if not segments:
        reasons = "; ".join(left_out.lines()) or "there are no files"
        raise ConfigurationError(f"no text was found in {printable(source)}: {reasons}")
    return sorted(segments, key=lambda segment: (_order(segment), segment.identity))


def list_python_stdlib(
    exclude: Sequence[str], output: str | None, left_out: LeftOut
) -> list[Segment]:
    """The segments of the library sources of the running Python; as :func:`list_corpus`.

    Raises:
        ConfigurationError: this Python has no library sources.
    """
    folder = sysconfig.get_path("stdlib")
    patterns = (*STDLIB_EXCLUDE, *exclude)
    segments = list_corpus([folder], STDLIB_INCLUDE, patterns, output, "text", left_out)
    # Whatever is no source of the library was never part of this corpus.
    for reason in ("not_included", "excluded", "linked_folder"):
        left_out.forget(reason)
    return segments


def listing_digest(segments: Sequence[Segment]) -> str:
    """sha256, in hex, of what the segments are called and how large they are."""
    # Plain text and JSONL are told apart as they were before there were other formats.
    kinds = {"text": False, "jsonl": True}
    return _digest_of(
        [part.identity, part.start, part.stop, kinds.get(part.format, part.format)]
        for part in segments
    )


def files_digest(segments: Sequence[Segment]) -> str:
    """sha256, in hex, of when each file was changed last.

    It tells a corpus that was edited between two starts of a preparation, which the
    names and sizes of its files may not show.
    """
    names = {segment.path: segment.identity for segment in reversed(segments)}
    return _digest_of(
        [name, os.stat(path).st_mtime_ns]
        for path, name in sorted(names.items(), key=lambda item: item[1])
    )


def _digest_of(records: Iterable[list[Any]]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record).encode() + b"\n")
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


def _is_taken(relative: str) -> bool:
    """Whether a file of a folder is taken by its name."""
    patterns = (TEXT_NAME, JSON_NAME, PARQUET_NAME)
    return any(pattern.fullmatch(relative) for pattern in patterns)


def _files(
    name: str, exclude: Sequence[str], skipped_folder: str | None, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """(path relative to the input, path) of the regular files of an input, but for those
    that ``exclude`` matches."""
    if os.path.isfile(name):
        relative = os.path.basename(name)
        if _matches_any(relative, exclude):
            left_out.add_file("excluded", relative)
        else:
            yield relative, name
        return
    if not os.path.isdir(name):
        reason = "is not a file or folder" if os.path.lexists(name) else "is missing"
        raise ConfigurationError(f"--input {printable(name)} {reason}")

    def refuse(error: OSError) -> None:
        raise ConfigurationError(
            f"cannot read {printable(error.filename)}: {error.strerror}"
        )

    for folder, folders, files in os.walk(name, onerror=refuse):
        below = Path(os.path.relpath(folder, name)).as_posix()
        prefix = "" if below == "." else f"{below}/"
        entered: list[str] = []
        for entry in sorted(folders):
            path = os.path.join(folder, entry)
            if os.path.realpath(path) == skipped_folder:
                continue
            if why := _folder_left_out(path, entry, exclude):
                left_out.add_file(why, f"{prefix}{entry}/")
            else:
                entered.append(entry)
        folders[:] = entered
        for entry in sorted(files):
            path, relative = os.path.join(folder, entry), prefix + entry
            if why := _file_left_out(path, relative, exclude):
                left_out.add_file(why, relative)
            else:
                yield relative, path


def _folder_left_out(path: str, name: str, exclude: Sequence[str]) -> str | None:
    """Why a folder is not entered, where it may hold far more files than all others."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if name.startswith("."):
        return "hidden_folder"
    return "linked_folder" if os.path.islink(path) else None


def _file_left_out(path: str, relative: str, exclude: Sequence[str]) -> str | None:
    if _matches_any(relative, exclude):
        return "excluded"
    if os.path.isfile(path):
        return None
    return "special" if os.path.exists(path) else "broken_link"


def _matches_any(relative: str, patterns: Sequence[str]) -> bool:
    return any(_matches(relative, pattern) for pattern in patterns)


def _matches(relative: str, pattern: str) -> bool:
    """Whether a pattern matches the path, the file's name, or a folder on the way."""
    parts = relative.split("/")
    return fnmatch.fnmatchcase(relative, pattern) or any(
        fnmatch.fnmatchcase(part, pattern) for part in parts
    )


def _segments(
    relative: str, identity: str, path: str, text_field: str | None
) -> list[Segment] | Unusable:
    size = os.path.getsize(path)
    if not size:
        return Unusable("empty")
    match = JSON_NAME.fullmatch(relative)
    if text_field is None and match is None:
        return Unusable("not_lines")
    if text_field is not None and PARQUET_NAME.fullmatch(relative):
        columns = parquet_row_groups(path, text_field)
        ends = itertools.accumulate(columns)
        return [
            Segment(f"{identity}@{group}", path, end - column, end, "parquet", group)
            for group, (column, end) in enumerate(zip(columns, ends))
        ] or Unusable("empty")
    if match is None:
        if relative.lower().endswith((".zst", ".zstd")):
            # It may need a library that is not installed.
            look_inside(path, size, None)
        return [Segment(identity, path, 0, size, "text")]
    # A file in .json may be a single value.
    field = text_field if match[1].lower() == "json" else None
    beginning = look_inside(path, size, field)
    if kind := not_text(beginning.head):
        return Unusable("not_utf8", kind)
    if not beginning.damaged and not (beginning.head and beginning.is_lines):
        return Unusable("json" if beginning.head else "empty")
    if beginning.compression is not None:
        return [Segment(identity, path, 0, size, f"jsonl.{beginning.compression}")]
    return [
        Segment(f"{identity}@{start}", path, start, stop, "jsonl")
        for start in range(0, size, JSONL_RANGE_BYTES)
        for stop in [min(start + JSONL_RANGE_BYTES, size)]
    ]


def _order(segment: Segment) -> bytes:
    name = segment.identity.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16, person=b"ten_dist.order").digest()

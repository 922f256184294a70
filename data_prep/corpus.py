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
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.contents import look_inside, not_text
from data_prep.formats import parquet_row_groups
from data_prep.left_out import LeftOut
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
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: str | None = None,
    text_field: str = "text",
    left_out: LeftOut | None = None,
) -> list[Segment]:
    """The segments of files and folders, in the order in which they become tokens.

    Folders are searched recursively, hidden ones, links and ``output`` excepted, for
    text, JSON Lines and Parquet by the ends of their names, or for ``include`` patterns
    where given; a file named itself is taken whatever its name. ``exclude`` patterns
    apply to both. A file that is reached twice counts once. What is not taken is added
    to ``left_out``.

    Raises:
        ConfigurationError: an input is missing or cannot be read, an ``include``
            pattern matches nothing that is not excluded, nothing is left, a Parquet file
            has no column ``text_field`` of text, or a library is not installed.
    """
    left_out = LeftOut() if left_out is None else left_out
    unmatched = set(include)
    skipped_folder = os.path.realpath(output) if output else None
    alone = {os.path.realpath(name) for name in inputs if os.path.isfile(name)}
    found: dict[str, tuple[str, str]] = {}
    for name in inputs:
        named = os.path.isfile(name)
        for relative, path in _files(name, exclude, skipped_folder, left_out):
            matched = [pattern for pattern in include if _matches(relative, pattern)]
            unmatched.difference_update(matched)
            if named or (matched if include else _is_taken(relative)):
                file = found.setdefault(os.path.realpath(path), (relative, path))
                if file != (relative, path):
                    left_out.add_file("repeated", relative)
            elif not alone or os.path.realpath(path) not in alone:
                reason = "not_included" if include else "unknown_name"
                left_out.add_file(reason, relative)
    if unmatched:
        raise ConfigurationError(
            f"--include {min(unmatched)!r} matches no file in {' '.join(inputs)}"
            + (" that --exclude leaves" if exclude else "")
        )
    return list_files(found.values(), text_field, left_out, " ".join(inputs))


def list_files(
    files: Iterable[tuple[str, str]], text_field: str, left_out: LeftOut, source: str
) -> list[Segment]:
    """The segments of files, in the order in which they become tokens.

    Args:
        files: (name within the corpus, path) of each.
        text_field: field of JSON Lines and column of Parquet that holds the text.
        left_out: where files that hold nothing to read are counted.
        source: where they come from, as the user named it.

    Raises:
        ConfigurationError: a file cannot be read, a Parquet file has no column
            ``text_field`` of text, a library is not installed, or no file has anything
            to read.
    """
    segments = _segments(files, text_field, left_out)
    if not segments:
        reasons = "; ".join(left_out.lines()) or "there are no files"
        raise ConfigurationError(f"no text was found in {printable(source)}: {reasons}")
    return sorted(segments, key=lambda segment: (_order(segment), segment.identity))


def list_python_stdlib(
    exclude: Sequence[str] = (),
    output: str | None = None,
    left_out: LeftOut | None = None,
) -> list[Segment]:
    """The segments of the standard library sources of the running Python.

    Raises:
        ConfigurationError: this Python has no library sources.
    """
    folder = sysconfig.get_path("stdlib")
    left_out = LeftOut() if left_out is None else left_out
    patterns = (*STDLIB_EXCLUDE, *exclude)
    segments = list_corpus(
        [folder], STDLIB_INCLUDE, patterns, output, left_out=left_out
    )
    # Whatever is no source of the library was never part of this corpus.
    for reason in ("not_included", "excluded", "linked_folder"):
        left_out.forget(reason)
    return segments


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
        entered = []
        for entry in sorted(folders):
            path = os.path.join(folder, entry)
            if os.path.realpath(path) == skipped_folder:
                continue
            reason = _folder_left_out(path, entry, exclude)
            if reason is None:
                entered.append(entry)
            else:
                left_out.add_file(reason, f"{prefix}{entry}/")
        folders[:] = entered
        for entry in sorted(files):
            path, relative = os.path.join(folder, entry), prefix + entry
            reason = _file_left_out(path, relative, exclude)
            if reason is None:
                yield relative, path
            else:
                left_out.add_file(reason, relative)


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
    files: Iterable[tuple[str, str]], text_field: str, left_out: LeftOut
) -> list[Segment]:
    segments = []
    uses: dict[str, int] = {}
    for relative, path in files:
        # Two inputs can hold files of one name: the second is called name#2.
        uses[relative] = uses.get(relative, 0) + 1
        identity = relative if uses[relative] == 1 else f"{relative}#{uses[relative]}"
        if not os.access(path, os.R_OK):
            raise ConfigurationError(
                f"cannot read {printable(path)}: permission denied"
            )
        size = os.path.getsize(path)
        if PARQUET_NAME.fullmatch(relative):
            found = _parquet_segments(identity, path, size, text_field)
        elif match := JSON_NAME.fullmatch(relative):
            may_be_a_value = match[1].lower() == "json"
            field = text_field if may_be_a_value else None
            found = _json_segments(identity, path, size, field, left_out)
        else:
            found = _text_segments(identity, path, size)
        if found == []:
            left_out.add_file("empty", identity)
        segments += found or []
    return segments


def _text_segments(identity: str, path: str, size: int) -> list[Segment]:
    if size and identity.lower().endswith((".zst", ".zstd")):
        # It may need a library that is not installed.
        look_inside(path, size, None)
    return [Segment(identity, path, 0, size, "text")] if size else []


def _parquet_segments(
    identity: str, path: str, size: int, text_field: str
) -> list[Segment]:
    segments, start = [], 0
    for group, column in enumerate(
        parquet_row_groups(path, text_field) if size else []
    ):
        named = f"{identity}@{group}"
        segments.append(Segment(named, path, start, start + column, "parquet", group))
        start += column
    return segments


def _json_segments(
    identity: str, path: str, size: int, field: str | None, left_out: LeftOut
) -> list[Segment] | None:
    """Those of JSON Lines; None if the file is something else, which is counted.

    ``field`` is what the first line must have to be taken for one of JSON Lines.
    """
    beginning = look_inside(path, size, field)
    if kind := not_text(beginning.head):
        return left_out.add_file("not_utf8", identity, kind)
    if not (beginning.head or beginning.damaged):
        return []
    if not (beginning.is_lines or beginning.damaged):
        return left_out.add_file("json", identity)
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

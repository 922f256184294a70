"""The documents in a segment of the corpus, whatever the format of its file."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.contents import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    DamagedError,
    has_field,
    not_text,
    opened,
)
from data_prep.conversations import Chat
from data_prep.formats import changed, parquet_texts
from data_prep.left_out import NOT_UTF8, NULL, LeftOut, Place, Unusable
from data_prep.pieces import ANYWHERE, Cuts, cut_pieces
from data_prep.ranks import Tick
from data_prep.segment import Segment
from data_prep.text_document import Document
from ten_dist.errors import DataError
from ten_dist.files import printable

LARGE_BYTES = 1 << 22
"""Size from which a text file is read in pieces, more than once, and never as a whole."""
CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = (8, 16)


class LargeDocument(Document):
    """A text file that is never in memory as a whole.

    It is read through once when it is made, for what can be asked of it, and once more
    for each call of :meth:`pieces`. ``advance`` is told of the bytes of the latter, as
    on the disk.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        DataError: it is not of the size that was listed, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, size: int, advance: Callable[[int], None]) -> None:
        self._path = path
        self._size = size
        self._advance = advance
        self.characters = 0
        self.blank = True
        self._digests: dict[int, bytes] = {}
        for text in self._decoded(lambda _: advance(0)):
            self.characters += len(text)
            self.blank = self.blank and not text.strip()

    def digest(self, size: int) -> bytes:
        return self._digests[size]

    def pieces(self, cuts: Cuts | None = ANYWHERE) -> Iterator[str]:
        expected = self._digests
        try:
            yield from cut_pieces(self._decoded(self._advance), cuts)
        except UnicodeDecodeError:
            raise changed(self._path) from None
        if self._digests != expected:
            raise changed(self._path)

    def _decoded(self, advance: Callable[[int], None]) -> Iterator[str]:
        """The text in chunks; at its end, size and digests are those of what was read."""
        hashes = {size: hashlib.blake2b(digest_size=size) for size in _DIGEST_BYTES}
        decoder = codecs.getincrementaldecoder("utf-8")()
        size = done = 0
        with (
            _naming_damage(printable(self._path)),
            opened(self._path, self._size) as file,
        ):
            while chunk := file.contents.read(CHUNK_BYTES):
                if not size:
                    chunk = chunk.removeprefix(BYTE_ORDER_MARK)
                size += len(chunk)
                for digest in hashes.values():
                    digest.update(chunk)
                yield decoder.decode(chunk)
                position = file.raw.tell()
                advance(position - done)
                done = position
        if done != self._size:
            raise changed(self._path)
        yield decoder.decode(b"", final=True)
        self.bytes = size
        self._digests = {size: digest.digest() for size, digest in hashes.items()}


@dataclass(frozen=True)
class Selection:
    """Which texts are documents: those of a field, and of at least so many characters; or
    conversations."""

    text_field: str
    min_length: int = 0
    chat: Chat | None = None


def unit_documents(
    segments: Sequence[Segment],
    selection: Selection,
    left_out: LeftOut,
    duplicates: np.ndarray | None,
    tick: Tick,
) -> Iterator[Document]:
    """The documents of a unit, in order; the others are added to ``left_out``.

    ``duplicates`` are the documents to leave out, by number: 1-D, ascending. ``tick`` is
    told of the bytes that were got through. Raises as :func:`read_documents`.
    """
    copies = iter(() if duplicates is None else duplicates)
    next_copy = next(copies, None)
    number = done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tick(count, 0)

    for segment in segments:
        done = 0
        for document in read_documents(segment, selection, left_out, advance):
            if number == next_copy:
                left_out.add("duplicate", document.place)
                next_copy = next(copies, None)
            else:
                yield document
            number += 1
        advance(segment.bytes - done)


def read_documents(
    segment: Segment,
    selection: Selection,
    left_out: LeftOut,
    advance: Callable[[int], None],
) -> Iterator[Document]:
    """The documents of a segment, in order; the others are added to ``left_out``.

    While the pieces of a large one are taken, ``advance`` is told of its bytes.

    Raises:
        DataError: a JSONL line is malformed or lacks the field, named as file:line; a
            compressed or Parquet file is damaged; or the file is not what was listed.
        OSError: the file cannot be read.
    """
    name, unit = printable(segment.file), segment.positions
    for position, text in _texts(segment, selection, advance):
        place = Place(name, position, unit)
        if isinstance(text, Unusable):
            left_out.add(text.reason, place._replace(note=text.note))
            continue
        document = Document(text) if isinstance(text, str) else text
        document.place = place
        if document.blank:
            left_out.add("blank", place)
        elif document.characters < selection.min_length:
            left_out.add("too_short", place)
        else:
            if document.note is not None:
                left_out.add(document.note, place)
            yield document


def _texts(
    segment: Segment, selection: Selection, advance: Callable[[int], None]
) -> Iterator[tuple[int, str | Document | Unusable]]:
    """What stands at each place of a segment, by its position."""
    if segment.format == "text":
        return iter([(0, _file_text(segment, selection.text_field, advance))])
    if segment.format == "parquet":
        return parquet_texts(segment, selection.text_field)
    return _line_texts(segment, selection)


def _file_text(
    segment: Segment, text_field: str, advance: Callable[[int], None]
) -> Document | Unusable:
    path, size = segment.path, segment.bytes
    with _naming_damage(printable(path)), opened(path, size) as file:
        limit = LARGE_BYTES if file.compression else min(size, LARGE_BYTES)
        data = file.contents.read(limit)
    if not data:
        return Unusable("empty")
    if kind := not_text(data[:HEAD_BYTES]):
        return Unusable("not_utf8", kind)
    try:
        if len(data) >= LARGE_BYTES:
            document: Document = LargeDocument(path, size, advance)
        else:
            document = Document(data.decode("utf-8"))
    except UnicodeDecodeError:
        return NOT_UTF8
    if has_field(data, text_field):
        document.note = "json_as_text"
    return document


@contextlib.contextmanager
def _naming_damage(place: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise DataError(
            f"{place}: the compressed file is damaged or cut off here ({error})"
        ) from None


def _line_texts(
    segment: Segment, selection: Selection
) -> Iterator[tuple[int, str | Document | Unusable]]:
    path = segment.path
    for position, line in _lines(segment):
        try:
            text = _text_of(line, selection)
        except _BadLineError as error:
            in_range = segment.format == "jsonl"
            number = line_number(path, position) if in_range else position
            raise DataError(f"{printable(path)}:{number}: {error}") from None
        yield position, text


def _lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a range of a file, with the byte at which they do; or
    those of a compressed file, with their number."""
    if segment.format == "jsonl":
        with open(segment.path, "rb") as plain:
            position = segment.start
            if position:
                # The line that reaches into this range began in an earlier one.
                plain.seek(position - 1)
                position += len(plain.readline()) - 1
            while position < segment.stop and (line := plain.readline()):
                yield position, line
                position += len(line)
        return
    with opened(segment.path, segment.stop) as file:
        for number in itertools.count(1):
            with _naming_damage(f"{printable(segment.path)}:{number}"):
                line = file.contents.readline()
            if not line:
                return
            yield number, line


class _BadLineError(Exception):
    """A line is not what JSON Lines must have; the message says why."""


def _text_of(line: bytes, selection: Selection) -> str | Document | Unusable:
    # Each line: files that were joined have a mark in the middle.
    line = line.removeprefix(BYTE_ORDER_MARK)
    if not line.strip():
        return Unusable("blank_line")
    try:
        # A byte that is no text may stand in another field.
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise _BadLineError(f"not a line of JSON ({reason})") from None
    if selection.chat is not None:
        return selection.chat.conversation(record)
    text_field = selection.text_field
    if not isinstance(record, dict) or text_field not in record:
        raise _BadLineError(
            f"no field {text_field!r}: give the field that holds the text with "
            "--text_field"
        )
    text = record[text_field]
    if text is None:
        return NULL
    if not isinstance(text, str):
        raise _BadLineError(f"field {text_field!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return NOT_UTF8
    return text


def line_number(path: str, offset: int) -> int:
    """The number, from 1, of the line of a file that begins at a byte.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        number, left = 1, offset
        while left and (chunk := file.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number

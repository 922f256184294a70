"""The documents in a segment of the corpus, whatever the format of its file."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.corpus import Segment
from data_prep.formats import compressed_lines, parquet_texts
from data_prep.journal import Skipped
from data_prep.ranks import Tick
from ten_dist.errors import DataError

LARGE_BYTES = 1 << 22
"""Size from which a text file is read in pieces, more than once, and never as a whole."""
PIECE_CHARACTERS = 1 << 17
"""What is encoded at once, in one thread: it takes hundreds of bytes a character."""
CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = (8, 16)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document:
    """A text in memory: ``bytes`` is its size in UTF-8, ``characters`` its length."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._data = text.encode("utf-8")
        self.bytes = len(self._data)
        self.characters = len(text)
        self.blank = not text.strip()

    def digest(self, size: int) -> bytes:
        """The blake2b digest of the text in UTF-8: 8 or 16 bytes."""
        return hashlib.blake2b(self._data, digest_size=size).digest()

    def is_held_out(self, val_fraction: float) -> bool:
        """Whether the document is held out for validation.

        It depends on the document's text alone, so a document stays on its side when
        the corpus grows, and copies of one document all fall on one side.
        """
        return int.from_bytes(self.digest(8), "big") / 2**64 < val_fraction

    def pieces(self) -> Iterator[str]:
        """The text, cut at line ends: an encoding takes far more than its text."""
        return cut_pieces([self._text])


class LargeDocument(Document):
    """A text file that is never in memory as a whole.

    It is read through once when it is made, for what can be asked of it, and once more
    for each call of :meth:`pieces`. ``advance`` is told of the bytes of the latter.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        DataError: it is not of the size that was listed.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, size: int, advance: Callable[[int], None]) -> None:
        self._path = path
        self._advance = advance
        self.bytes = size
        self.characters = 0
        self.blank = True
        self._digests = {}
        for text in self._decoded(lambda _: advance(0)):
            self.characters += len(text)
            self.blank = self.blank and not text.strip()

    def digest(self, size: int) -> bytes:
        return self._digests[size]

    def pieces(self) -> Iterator[str]:
        expected = self._digests
        try:
            yield from cut_pieces(self._decoded(self._advance))
        except UnicodeDecodeError:
            raise _changed(self._path) from None
        if self._digests != expected:
            raise _changed(self._path)

    def _decoded(self, advance: Callable[[int], None]) -> Iterator[str]:
        """The text in chunks; at its end, the digests are those of what was read."""
        hashes = {size: hashlib.blake2b(digest_size=size) for size in _DIGEST_BYTES}
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self._path, "rb") as file:
            left = self.bytes
            while chunk := file.read(CHUNK_BYTES):
                left -= len(chunk)
                for digest in hashes.values():
                    digest.update(chunk)
                yield decoder.decode(chunk)
                advance(len(chunk))
        if left:
            raise _changed(self._path)
        yield decoder.decode(b"", final=True)
        self._digests = {size: digest.digest() for size, digest in hashes.items()}


def cut_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Join a text that comes in chunks, and cut it into pieces, at line ends.

    A piece has at most :data:`PIECE_CHARACTERS`; where the cuts are depends on the text
    alone, not on its chunks.
    """
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
            stop = cut if cut > start else start + PIECE_CHARACTERS
            yield text[start:stop]
            start = stop
        rest = text[start:]
    yield rest


def _changed(path: str) -> DataError:
    return DataError(f"{path} changed while it was being prepared")


@dataclass(frozen=True)
class Selection:
    """Which texts are documents: those of a field, and of at least so many characters."""

    text_field: str
    min_length: int = 0


def unit_documents(
    segments: Sequence[Segment],
    selection: Selection,
    skipped: Skipped,
    duplicates: np.ndarray | None,
    tick: Tick,
) -> Iterator[Document]:
    """The documents of a unit, in order; those left out are added to ``skipped``.

    Args:
        segments: Those of the unit.
        selection: Which texts are documents.
        skipped: Where to count what is left out.
        duplicates: Which of them to leave out, by their number: 1-D, ascending.
        tick: Told of the bytes that were got through.

    Raises:
        DataError, OSError: as :func:`read_documents`.
    """
    copies = iter(() if duplicates is None else duplicates)
    next_copy = next(copies, None)
    number = 0
    for segment in segments:
        progress = _Progress(tick)
        for document in read_documents(segment, selection, skipped, progress):
            if number == next_copy:
                skipped.duplicates += 1
                next_copy = next(copies, None)
            else:
                yield document
            number += 1
        progress(segment.bytes - progress.done)


class _Progress:
    """Ticks for the bytes of a segment, and remembers how many those were."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self.done = 0

    def __call__(self, count: int) -> None:
        self.done += count
        self._tick(count, 0)


def read_documents(
    segment: Segment,
    selection: Selection,
    skipped: Skipped,
    advance: Callable[[int], None],
) -> Iterator[Document]:
    """The documents of a segment, in order; those left out are added to ``skipped``.

    While the pieces of a large one are taken, ``advance`` is told of its bytes.

    Raises:
        DataError: a JSONL line is malformed or lacks the field, named as file:line; a
            compressed or Parquet file is damaged; or the file is not what was listed.
        OSError: the file cannot be read.
    """
    text_field = selection.text_field
    texts: Iterator[str | Document | None]
    if segment.format == "text":
        texts = _file_text(segment, advance)
    elif segment.format == "jsonl":
        texts = _jsonl_texts(segment, text_field)
    elif segment.format == "parquet":
        texts = parquet_texts(segment, text_field)
    else:
        texts = _compressed_texts(segment, text_field)
    for text in texts:
        if text is None:
            skipped.not_utf8 += 1
            continue
        document = Document(text) if isinstance(text, str) else text
        if document.blank:
            skipped.empty += 1
        elif document.characters < selection.min_length:
            skipped.too_short += 1
        else:
            yield document


def _file_text(
    segment: Segment, advance: Callable[[int], None]
) -> Iterator[str | Document | None]:
    try:
        if segment.bytes >= LARGE_BYTES:
            yield LargeDocument(segment.path, segment.bytes, advance)
            return
        with open(segment.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != segment.stop:
                raise _changed(segment.path)
            yield file.read().decode("utf-8")
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
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():

                def place(begin: int = begin) -> str:
                    return _place(segment.path, begin)

                yield _line_text(line, text_field, place)


def _compressed_texts(segment: Segment, text_field: str) -> Iterator[str | None]:
    for number, line in enumerate(compressed_lines(segment), 1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():

            def place(number: int = number) -> str:
                return f"{segment.path}:{number}"

            yield _line_text(line, text_field, place)


def _line_text(line: bytes, text_field: str, place: Callable[[], str]) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise DataError(f"{place()}: not a line of JSON ({reason})") from None
    if not isinstance(record, dict) or text_field not in record:
        raise DataError(
            f"{place()}: no field {text_field!r}: give the field that holds the text "
            "with --text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{place()}: field {text_field!r} is not a string")
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

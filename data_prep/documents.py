"""The documents in a segment of the corpus, whatever the format of its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.corpus import Segment
from data_prep.formats import compressed_lines, parquet_texts
from data_prep.journal import Skipped
from data_prep.ranks import Tick
from ten_dist.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
) -> Iterator[str]:
    """The documents of a unit, in order; those left out are added to ``skipped``.

    Args:
        segments: Those of the unit.
        selection: Which texts are documents.
        skipped: Where to count what is left out.
        duplicates: Which of them to leave out, by their number: 1-D, ascending.
        tick: Told of the bytes of each segment when it is done.

    Raises:
        DataError, OSError: as :func:`read_documents`.
    """
    copies = iter(() if duplicates is None else duplicates)
    next_copy = next(copies, None)
    number = 0
    for segment in segments:
        for text in read_documents(segment, selection, skipped):
            if number == next_copy:
                skipped.duplicates += 1
                next_copy = next(copies, None)
            else:
                yield text
            number += 1
        tick(segment.bytes, 0)


def read_documents(
    segment: Segment, selection: Selection, skipped: Skipped
) -> Iterator[str]:
    """The documents of a segment, in order; those left out are added to ``skipped``.

    Raises:
        DataError: a JSONL line is malformed or lacks the field, named as file:line; a
            compressed or Parquet file is damaged; or the file is not what was listed.
        OSError: the file cannot be read.
    """
    text_field = selection.text_field
    if segment.format == "text":
        texts = _file_text(segment)
    elif segment.format == "jsonl":
        texts = _jsonl_texts(segment, text_field)
    elif segment.format == "parquet":
        texts = parquet_texts(segment, text_field)
    else:
        texts = _compressed_texts(segment, text_field)
    for text in texts:
        if text is None:
            skipped.not_utf8 += 1
        elif not text.strip():
            skipped.empty += 1
        elif len(text) < selection.min_length:
            skipped.too_short += 1
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

"""Compressed JSONL and Parquet: what needs a library that not everyone has.

A compressed file can be read only from its beginning, so it is one segment. A Parquet
file is a segment for each of its row groups. Both are read in bounded memory.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ten_dist.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from data_prep.corpus import Segment

_COMPRESSED_BYTES = 1 << 14
_BATCH_BYTES = 1 << 23
_LIBRARIES = {"jsonl.zst": "zstandard", "parquet": "pyarrow.parquet"}


def check_library(format_: str, path: str) -> None:
    """Refuse a file of a format whose library is not installed.

    Raises:
        ConfigurationError: it is not; the message says how to install it.
    """
    if format_ not in _LIBRARIES:
        return
    try:
        _library(format_)
    except ImportError as error:
        package = _LIBRARIES[format_].split(".")[0]
        raise ConfigurationError(
            f"{path} cannot be read without {package} ({error}): install it with `pip "
            f"install 'ten_dist[formats]'`, or leave it out with --exclude '*.{format_}'"
        ) from None


def _library(format_: str) -> Any:
    # Imported when a file needs it: they are large, and a plain corpus does without.
    return importlib.import_module(_LIBRARIES[format_])


def compressed_lines(segment: Segment) -> Iterator[bytes]:
    """The lines of a gzip or zstandard file, of one frame or several.

    Raises:
        DataError: it is damaged or cut off, named as file:line, or has changed.
        OSError: the file cannot be read.
    """
    zstandard = segment.format == "jsonl.zst"
    damages: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if zstandard:
        damages = (EOFError, _library(segment.format).ZstdError)
    number = 0
    with open(segment.path, "rb") as raw:
        if os.fstat(raw.fileno()).st_size != segment.stop:
            raise DataError(f"{segment.path} changed while it was being prepared")
        with _zstandard_file(raw) if zstandard else gzip.GzipFile(fileobj=raw) as lines:
            while True:
                number += 1
                try:
                    line = lines.readline()
                except damages as error:
                    raise DataError(
                        f"{segment.path}:{number}: the compressed file is damaged or "
                        f"cut off here ({error})"
                    ) from None
                if not line:
                    return
                yield line


def _zstandard_file(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Chunks(_zstandard_chunks(raw)), 1 << 17)


def _zstandard_chunks(raw: BinaryIO) -> Iterator[bytes]:
    # The library's own file-like reader takes a file that is cut off for a whole one.
    decompressor = _library("jsonl.zst").ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while data := raw.read(_COMPRESSED_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            if chunk := frame.decompress(data):
                yield chunk
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")


class _Chunks(io.RawIOBase):
    """Chunks of bytes, none of them empty, as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def parquet_row_groups(path: str, text_field: str) -> list[int]:
    """The bytes that the text column takes up in each row group, decompressed.

    Raises:
        ConfigurationError: there is no such column, or it does not hold text.
        DataError: the file is no Parquet file, or is damaged.
        OSError: the file cannot be read.
    """
    with _naming_damage(path), _library("parquet").ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, text_field)
        metadata = file.metadata
        return [
            _column_bytes(metadata.row_group(index), text_field)
            for index in range(metadata.num_row_groups)
        ]


def parquet_texts(segment: Segment, text_field: str) -> Iterator[str | None]:
    """The texts of a row group, in order: "" for a null, None where not UTF-8.

    Raises:
        ConfigurationError: there is no such column any more.
        DataError: the row group is damaged, or the file has changed.
        OSError: the file cannot be read.
    """
    import pyarrow

    path, group = segment.path, segment.row_group
    parquet = _library("parquet")
    with (
        _naming_damage(f"{path}: row group {group}"),
        parquet.ParquetFile(
            path,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
        ) as file,
    ):
        _check_column(path, file.schema_arrow, text_field)
        if group >= file.metadata.num_row_groups:
            raise DataError(f"{path} changed while it was being prepared")
        metadata = file.metadata.row_group(group)
        size = _column_bytes(metadata, text_field)
        if size != segment.bytes:
            raise DataError(f"{path} changed while it was being prepared")
        rows = max(1, metadata.num_rows * _BATCH_BYTES // max(size, _BATCH_BYTES))
        for batch in file.iter_batches(
            rows, row_groups=[group], columns=[text_field], use_threads=False
        ):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: pyarrow does not check that what is called a string is UTF-8.
            for data in column.cast(pyarrow.large_binary()).to_pylist():
                try:
                    yield "" if data is None else data.decode("utf-8")
                except UnicodeDecodeError:
                    yield None


@contextlib.contextmanager
def _naming_damage(place: str) -> Iterator[None]:
    """Turn what pyarrow raises about a file's contents into a :class:`DataError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        # Its errors of decoding are an OSError without a number; those of a failing
        # disk have one.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise DataError(f"{place}: damaged, or not Parquet ({reason})") from None


def _check_column(path: str, schema: Any, text_field: str) -> None:
    import pyarrow

    if schema.names.count(text_field) != 1:
        raise ConfigurationError(
            f"{path}: no column {text_field!r}, it has {' '.join(schema.names)}: give "
            "the column that holds the text with --text_field"
        )
    kind = schema.field(text_field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_string", "is_large_string", "is_binary", "is_large_binary")
    if not any(getattr(pyarrow.types, check)(kind) for check in checks):
        raise ConfigurationError(
            f"{path}: column {text_field!r} holds {kind}, not text: give the column "
            "that does with --text_field"
        )


def _column_bytes(row_group: Any, text_field: str) -> int:
    columns = (row_group.column(index) for index in range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == text_field
    )

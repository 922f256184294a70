"""Parquet, and the libraries of formats that not everyone has.

A Parquet file is a segment for each of its row groups, and is read in bounded memory.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from data_prep.left_out import NOT_UTF8, NULL, Unusable
from data_prep.segment import Segment
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import printable

_BATCH_BYTES = 1 << 23
_LIBRARIES = {"zst": "zstandard", "parquet": "pyarrow.parquet"}


def load_library(ending: str, path: str) -> Any:
    """The library that files of an ending, "zst" or "parquet", are read with.

    It is loaded when a file needs it: a plain corpus does without.

    Raises:
        ConfigurationError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(_LIBRARIES[ending])
    except ImportError as error:
        package = _LIBRARIES[ending].split(".")[0]
        raise ConfigurationError(
            f"{printable(path)} cannot be read without {package} ({error}): install it "
            "with `pip install 'ten_dist[formats]'`, or leave it out with --exclude "
            f"'*.{ending}'"
        ) from None


def parquet_row_groups(path: str, text_field: str) -> list[int]:
    """The bytes that the text column takes up in each row group, decompressed.

    There are none where the file has no rows.

    Raises:
        ConfigurationError: there is no such column, or it does not hold text.
        DataError: the file is no Parquet file, or is damaged.
        OSError: the file cannot be read.
    """
    parquet = load_library("parquet", path)
    with _naming_damage(printable(path)), parquet.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, text_field)
        metadata = file.metadata
        if metadata.num_rows == 0:
            return []
        return [
            _column_bytes(metadata.row_group(index), text_field)
            for index in range(metadata.num_row_groups)
        ]


def parquet_texts(
    segment: Segment, text_field: str
) -> Iterator[tuple[int, str | Unusable]]:
    """The texts of a row group, in order, each with the number of its row in the file.

    Raises:
        ConfigurationError: there is no such column any more.
        DataError: the row group is damaged, or the file has changed.
        OSError: the file cannot be read.
    """
    import pyarrow

    path, group = segment.path, segment.row_group
    parquet = load_library("parquet", path)
    with (
        _naming_damage(f"{printable(path)}: row group {group}"),
        parquet.ParquetFile(
            path,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
        ) as file,
    ):
        _check_column(path, file.schema_arrow, text_field)
        if group >= file.metadata.num_row_groups:
            raise changed(path)
        metadata = file.metadata.row_group(group)
        size = _column_bytes(metadata, text_field)
        if size != segment.bytes:
            raise changed(path)
        row = sum(file.metadata.row_group(i).num_rows for i in range(group))
        rows = max(1, metadata.num_rows * _BATCH_BYTES // max(size, _BATCH_BYTES))
        for batch in file.iter_batches(
            rows, row_groups=[group], columns=[text_field], use_threads=False
        ):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: pyarrow does not check that what is called a string is UTF-8.
            for data in column.cast(pyarrow.large_binary()).to_pylist():
                row += 1
                yield row, _text(data)


def changed(path: str) -> DataError:
    """The error of a file that is not what was listed."""
    return DataError(f"{printable(path)} changed while it was being prepared")


def _text(data: bytes | None) -> str | Unusable:
    try:
        return NULL if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8


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

    count = schema.names.count(text_field)
    if count > 1:
        raise ConfigurationError(
            f"{printable(path)}: {count} columns are called {text_field!r}: leave all "
            "but one out, or rename them, and write the file again"
        )
    if count == 0:
        raise ConfigurationError(
            f"{printable(path)}: no column {text_field!r}, it has "
            f"{' '.join(schema.names)}: give the column that holds the text with "
            "--text_field"
        )
    kind = schema.field(text_field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_string", "is_large_string", "is_binary", "is_large_binary")
    if not any(getattr(pyarrow.types, check)(kind) for check in checks):
        raise ConfigurationError(
            f"{printable(path)}: column {text_field!r} holds {kind}, not text: give the column "
            "that does with --text_field"
        )


def _column_bytes(row_group: Any, text_field: str) -> int:
    columns = (row_group.column(index) for index in range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == text_field
    )

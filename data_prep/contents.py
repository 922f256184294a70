"""What a file holds, whatever its name says: compressed, text, or neither.

The first bytes tell. A compressed file can be read only from its beginning, and is read
in bounded memory.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data_prep.formats import changed, load_library

HEAD_BYTES = 512
"""What :func:`not_text` has to see of the beginning."""
BYTE_ORDER_MARK = "\ufeff".encode()
_COMPRESSED_BYTES = 1 << 14
_LINE_BYTES = 1 << 26
# Some programs write zstandard that begins with a frame to be skipped.
_COMPRESSED = re.compile(
    rb"(?P<gz>\x1f\x8b\x08)"
    rb"|(?P<zst>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
    rb"|(?P<bz2>BZh[1-9](1AY&SY|\x17rE8P\x90))"
    rb"|(?P<xz>\xfd7zXZ\0)"
)
_UTF_16 = "UTF-16: `iconv -f UTF-16 -t UTF-8` converts it"
_UTF_32 = "UTF-32: `iconv -f UTF-32 -t UTF-8` converts it"
_KINDS = {
    b"\xff\xfe\0\0": _UTF_32,
    b"\0\0\xfe\xff": _UTF_32,
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"PAR1": "Parquet: name it .parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "PDF",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3\0": "an SQLite database",
    b"\x7fELF": "a program",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


class DamagedError(Exception):
    """A compressed file is damaged or cut off."""


def compression_of(head: bytes) -> str | None:
    """How a file that begins with ``head`` is compressed: "gz", "zst", "bz2", "xz"."""
    found = _COMPRESSED.match(head)
    return None if found is None else found.lastgroup


def not_text(head: bytes) -> str | None:
    """What a file is that cannot be text in UTF-8; None if it may be.

    Args:
        head: the first :data:`HEAD_BYTES` of it, or all.
    """
    for magic, kind in _KINDS.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    # A zero is a character of UTF-8, but no text has so many of them.
    if head.count(0) * 4 > len(head):
        return "UTF-16 without a mark, or no text: a large part is zero bytes"
    return None


def has_field(contents: bytes, name: str) -> bool:
    """Whether the first line that is not blank is a JSON object with a field."""
    contents = contents.removeprefix(BYTE_ORDER_MARK)
    if contents[:1].isspace():
        contents = contents.lstrip()
    if not contents.startswith(b"{"):
        return False
    try:
        record = json.loads(contents.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return name in record


class Opened(NamedTuple):
    """A file that is open: what it holds, itself, and how it is compressed, if it is."""

    contents: BinaryIO
    raw: BinaryIO
    compression: str | None


@contextlib.contextmanager
def opened(path: str, size: int) -> Iterator[Opened]:
    """Open a file for its contents, decompressed where they are compressed.

    Reading the contents raises :class:`DamagedError` where they are damaged.

    Raises:
        ConfigurationError: the library that decompresses it is not installed.
        DataError: it is not of the size that was listed.
        OSError: it cannot be read.
    """
    with open(path, "rb") as raw:
        if os.fstat(raw.fileno()).st_size != size:
            raise changed(path)
        kind = compression_of(raw.peek(HEAD_BYTES))
        if kind is None:
            yield Opened(raw, raw, None)
            return
        if kind == "zst":
            load_library(kind, path)
        chunks = _Chunks(_decompressed(raw, kind))
        with io.BufferedReader(chunks, 1 << 17) as contents:
            yield Opened(contents, raw, kind)


@dataclass(frozen=True)
class Beginning:
    """What a look at the beginning of a file shows."""

    compression: str | None
    head: bytes
    """The first :data:`HEAD_BYTES` of the contents."""
    is_lines: bool
    """Whether the first line has the field that was asked for, if one was."""
    damaged: bool = False


def look_inside(path: str, size: int, field: str | None) -> Beginning:
    """Look at the beginning of a file: where ``field`` is given, at its first line.

    Raises:
        ConfigurationError, DataError, OSError: as :func:`opened`.
    """
    with opened(path, size) as file:
        try:
            head = file.contents.read(HEAD_BYTES)
            is_lines = field is None or has_field(
                head + file.contents.readline(_LINE_BYTES), field
            )
        except DamagedError:
            return Beginning(file.compression, b"", False, damaged=True)
        return Beginning(file.compression, head, is_lines)


def _decompressor(kind: str) -> Any:
    if kind == "gz":
        return zlib.decompressobj(wbits=31)
    if kind == "zst":
        library = load_library(kind, "a file")
        return library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return bz2.BZ2Decompressor() if kind == "bz2" else lzma.LZMADecompressor()


def _decompressed(raw: BinaryIO, kind: str) -> Iterator[bytes]:
    # The file-like readers of the libraries pass over what follows a frame, or take a
    # file that is cut off for a whole one.
    frame = None
    while data := raw.read(_COMPRESSED_BYTES):
        while data:
            if frame is None:
                # Zeros fill up the blocks of a tape.
                data = data.lstrip(b"\0")
                if not data:
                    break
                frame = _decompressor(kind)
            try:
                chunk = frame.decompress(data)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - each library has its own
                raise DamagedError(str(error)) from None
            if chunk:
                yield chunk
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DamagedError("it ends too early")


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

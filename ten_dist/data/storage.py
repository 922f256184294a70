"""Where a token set lies, and reading its files: a folder, or a URL that fsspec opens.

What decides between the two is here, so that the rest of the package reads both alike.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO, TypeAlias

from ten_dist.data.remote import RemoteAccess, RemotePath
from ten_dist.errors import DataError

Location: TypeAlias = Path | RemotePath
"""A folder or file. Both have `/`, `str`, `name`, `resolve` and `read_bytes`."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def is_url(address: str | os.PathLike[str] | RemotePath) -> bool:
    """Whether an address is a URL, such as `s3://bucket/folder`, rather than a path."""
    return isinstance(address, RemotePath) or bool(_URL.match(os.fspath(address)))


def locate(
    address: str | os.PathLike[str] | RemotePath, access: RemoteAccess | None = None
) -> Location:
    """The location that an address names; nothing is opened.

    Args:
        address: a path or a URL.
        access: how files of a URL are fetched; by default streamed, with retries.

    Raises:
        DataError: the URL carries a secret, or no installed package can open it.
    """
    if isinstance(address, RemotePath):
        return address
    if is_url(address):
        return RemotePath.of(os.fspath(address), access or RemoteAccess())
    return Path(address)


def open_shard_file(path: Location, size: int, sha256: str) -> BinaryIO:
    """Open a shard for reading; what comes from a server has this size and hash.

    Local shards are not hashed again: that is done for all of them when a run starts.

    Raises:
        OSError: it cannot be read; ``strerror`` says why.
    """
    if isinstance(path, RemotePath):
        return io.BytesIO(path.read_shard(size, sha256))
    return open(path, "rb")


def held_out_set(location: Location) -> Location | None:
    """The folder `val` of a token set, where there is one.

    Raises:
        DataError: a server does not say whether there is.
    """
    beside = location / "val"
    if isinstance(beside, Path):
        return beside if beside.is_dir() else None
    try:
        # A server has files, not folders.
        return beside if (beside / "manifest.json").exists() else None
    except OSError as error:
        raise DataError(
            f"cannot find out whether {beside} exists: {error.strerror}"
        ) from None

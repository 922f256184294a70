"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file, whole: written beside it, brought to the disk, renamed."""
    temporary = temporary_of(path)
    with removed_on_error(temporary):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def temporary_of(path: Path) -> Path:
    """The file beside `path` that is written first.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    # "" and "/" are paths of folders that have no name to add to.
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def removed_on_error(temporary: Path) -> Iterator[None]:
    """Remove a file that could not be written, and have the ``OSError`` name it.

    Errors of writing, such as that of a full disk, do not say by themselves which file.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(temporary)) from error
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: what was renamed into it stays there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; no path is too long to ask."""
    try:
        return path.exists()
    except OSError:
        return False


def unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made or written to, found without writing; None if it can."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    if not existing.is_dir():
        return f"cannot be made: {existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot be written to: no permission in {existing}"
    return None

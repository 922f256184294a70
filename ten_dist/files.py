"""Files that are replaced atomically, and small files that users wrote."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ten_dist.errors import ConfigurationError


def read_user_text(path: Path, what: str, advice: str = "") -> str:
    """The text of a small file that a user wrote, in UTF-8, without a byte order mark.

    Args:
        path: the file.
        what: how messages begin, such as ``--hostfile hosts``.
        advice: how they end.

    Raises:
        ConfigurationError: it cannot be read, or is not UTF-8.
    """
    data = b""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not text in UTF-8"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            reason = "it is UTF-16: `iconv -f UTF-16 -t UTF-8` converts it"
    advice = f"; {advice}" if advice else ""
    raise ConfigurationError(f"{what} cannot be read: {reason}{advice}")


def printable(name: str) -> str:
    """A file's name in one line: what cannot be printed is escaped as in Python, and a
    name that begins or ends with white space is quoted."""
    shown = "".join(map(_printable, name))
    return shown if name == name.strip() else f"'{shown}'"


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    # Python keeps a byte of a name that is not UTF-8 as half a pair.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; bytes of names that are not UTF-8 become escape
    sequences of JSON."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically; write into what is no file, such as a pipe."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replaced(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Replace a file atomically: what the caller writes to the temporary file that this
    yields is synced to the disk, then renamed.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    # "" and "/" are paths of folders that have no name to add to.
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(path.name + ".tmp")
    with removed_on_error(temporary):
        yield temporary
        sync(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that is complete or absent: what the caller puts into the temporary
    folder that this yields gets its name at the end. An empty folder may be there.

    After an error nothing is left, parents that were not there included.
    """
    path = path.absolute()
    made = [p for p in path.parents if not p.exists()]
    # Beside it, so that it can be renamed.
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


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


def sync(path: Path) -> None:
    """Have fsync bring a file to the disk, or the names of the files in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
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


def check_current_folder() -> None:
    """Refuse to work where the current folder is gone: libraries in C end the process.

    Raises:
        ConfigurationError: somebody has removed it.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigurationError(
            "the current folder has been removed: change to one that exists"
        ) from None

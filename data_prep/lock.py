"""One preparation at a time into a folder: a lock that ends with the process that has it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from ten_dist.errors import ConfigurationError

LOCK_NAME = ".preparing.lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """The lock of a folder that exists, on a hidden file in it.

    The file system keeps it, also between machines where that is a shared one with
    locks; it is gone with its holder, however that ends. The file may stay behind then:
    it means nothing by itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Take the lock; None, or what to tell the user where there can be none.

        Raises:
            ConfigurationError: another process has it.
            OSError: the file cannot be made or opened.
        """
        while self._descriptor is None:
            # For writing: network file systems give such a lock to no reader.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _WITHOUT_LOCKS:
                    self._path.unlink(missing_ok=True)
                    return (
                        f"the file system of {self._folder} has no locks: see that no "
                        "second preparation writes there"
                    )
                if isinstance(error, BlockingIOError):
                    raise ConfigurationError(
                        f"another preparation is writing to --output {self._folder}: "
                        "wait for its end, or choose another folder"
                    ) from None
                raise
            if self._is_the_file(descriptor):
                self._descriptor = descriptor
            else:
                # Its holder removed it, after it had been opened here.
                os.close(descriptor)
        return None

    def release(self) -> None:
        """Give the lock back, where it is held, and remove its file."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

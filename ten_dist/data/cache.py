"""Shards of a server kept on local disk, for all processes of a machine.

```
DATA_CACHE/
  SHA256.tar       a shard, complete; its time of modification is that of its last use
  SHA256.tar.tmp   one that is being written, or was when its writer was killed
  locks/           which processes hold while they fetch or write
```

Shards go by their hash, so sets that share some share the files. A lock file is never
deleted: a process could then hold one that others no longer see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock

from ten_dist.console import warn
from ten_dist.errors import ConfigurationError
from ten_dist.files import unwritable, write_bytes

_OWN_FILE = re.compile(r"[0-9a-f]{64}\.tar(\.tmp)?")


@dataclasses.dataclass(frozen=True)
class ShardCache:
    """A folder of shards that holds at most so many bytes of them."""

    directory: Path
    limit_bytes: int | None = None
    """The least recently used shards are deleted to stay within; None keeps all."""

    def check(self, largest_bytes: int) -> None:
        """Find out, without writing, whether shards of this size can be kept.

        Raises:
            ConfigurationError: the folder cannot be made or written to, or the limit is
                below ``largest_bytes``.
        """
        reason = unwritable(self.directory)
        if reason is not None:
            raise ConfigurationError(f"--data_cache {self.directory} {reason}")
        if self.limit_bytes is not None and self.limit_bytes < largest_bytes:
            raise ConfigurationError(
                f"--data_cache_gigabytes {self.limit_bytes / 1e9:g} does not hold the "
                f"largest shard: give at least {largest_bytes / 1e9:g}, better twenty "
                "times that, for the shards that are read or come next at one time"
            )

    def read(self, sha256: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The shard of this hash and size, from the disk or else from ``fetch``.

        What lies on the disk is hashed each time, and fetched again if it is damaged.
        While one process fetches a shard, others that need it wait for it. Where the
        disk refuses, the shard is used all the same.

        Raises:
            OSError: as ``fetch``.
        """
        content = self._stored(sha256, size)
        if content is not None:
            return content
        with contextlib.ExitStack() as stack:
            try:
                # A few hundred locks rather than one a shard; two shards seldom meet.
                stack.enter_context(self._lock(sha256[:2]))
            except OSError as error:
                self._complain(error)
                return fetch()
            content = self._stored(sha256, size)
            if content is None:
                content = fetch()
                try:
                    self._store(sha256, content)
                except OSError as error:
                    self._complain(error)
        return content

    def _complain(self, error: OSError) -> None:
        reason = error.strerror or error
        warn(f"--data_cache {self.directory} does not take a shard: {reason}")

    def _path(self, sha256: str) -> Path:
        return self.directory / f"{sha256}.tar"

    def _lock(self, name: str) -> BaseFileLock:
        folder = self.directory / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def _stored(self, sha256: str, size: int) -> bytes | None:
        path = self._path(sha256)
        try:
            # Whoever deletes the file meanwhile does not disturb one that is open.
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(f"{path} cannot be read ({error.strerror}): fetching it again")
            return None
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            warn(f"{path} is damaged: fetching it again")
            path.unlink(missing_ok=True)
            return None
        # Deleted in this very moment, or in a folder that may only be read.
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def _store(self, sha256: str, content: bytes) -> None:
        # One writer at a time: the limit then holds at every moment, and a temporary
        # file is one that a killed process has left.
        with self._lock("writing"):
            held = []
            for path in self.directory.iterdir():
                if _OWN_FILE.fullmatch(path.name) and path.suffix == ".tmp":
                    path.unlink(missing_ok=True)
                elif _OWN_FILE.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        held.append((status.st_mtime_ns, status.st_size, path))
            if self._make_room(held, len(content)):
                write_bytes(self._path(sha256), content)

    def _make_room(self, held: list[tuple[int, int, Path]], wanted: int) -> bool:
        """Delete what was not used for longest; whether ``wanted`` bytes fit then."""
        if self.limit_bytes is None:
            return True
        if wanted > self.limit_bytes:
            return False
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total + wanted <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return True

"""The output folder: claimed before work, continued where it stopped, completed last.

A folder in preparation holds a journal. Only a folder that is empty or has a journal is
ever written to, so nothing of the user's can be lost; and what a killed run finished is
recognised and kept, what it did not finish is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from data_prep.journal import JOURNAL_NAME, Journal, UnitResult
from ten_dist.data.manifest import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardRecord,
)
from ten_dist.data.tokenizer import TOKENIZER_NAME, file_sha256
from ten_dist.data.verify import verify_shards
from ten_dist.errors import ConfigurationError
from ten_dist.files import sync, write_text

VAL_FOLDER = "val"
LOCK_NAME = ".preparing.lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_OWN_FILE = re.compile(
    r"(shard-\d{5,}\.tar|(manifest|tokenizer)\.json|chat_template\.jinja)(\.tmp)?"
)


class Found(Enum):
    """What a folder held when it was claimed."""

    NOTHING = "nothing"
    SAME = "what an interrupted preparation of the same left: it can be continued"
    OTHER = "what an interrupted preparation of something else left: it was removed"


class Output:
    """An output folder, and ``val_folder`` within it for the held-out set.

    ``val`` says whether there is to be one. ``claimed`` says, on the rank that claimed
    it, whether the folder is in preparation.
    """

    def __init__(self, folder: Path, val: bool) -> None:
        self.folder = folder
        self.val_folder = folder / VAL_FOLDER
        self._folders = [self.val_folder, folder] if val else [folder]
        self.journal = Journal(folder)
        self._lock = FolderLock(folder)
        self.claimed = False

    def prepared(self, source_sha256: str) -> Manifest | None:
        """The manifest if the folder already holds what is asked for; None if it is new.

        Raises:
            ConfigurationError: it holds something else: data of another corpus or other
                options, damaged data, or files that are not ours.
        """
        try:
            names = {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise ConfigurationError(
                f"--output {self.folder} is a file, not a folder"
            ) from None
        if MANIFEST_NAME in names:
            manifest = Manifest.load(self.folder)
            if manifest.source.get("sha256") != source_sha256:
                raise ConfigurationError(
                    f"--output {self.folder} holds data of another corpus or of other "
                    "options: choose another folder, or remove that one"
                )
            for folder in self._folders:
                verify_shards(Manifest.load(folder), full=False)
            self.journal.remove()
            return manifest
        visible = any(not name.startswith(".") for name in names)
        if visible and JOURNAL_NAME not in names:
            raise ConfigurationError(
                f"--output {self.folder} is not empty and holds no prepared data: "
                "choose a new or empty folder"
            )
        return None

    def lock(self) -> str | None:
        """Keep other preparations out of the folder, which is made if it is missing.

        Returns None, or what to tell the user where the file system has no locks.

        Raises:
            ConfigurationError: another preparation is writing to the folder, or it
                cannot be created or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._lock.take()
        except OSError as error:
            self._remove_if_empty()
            raise self._refusal(error) from None

    def release(self) -> None:
        """Let other preparations in again, where :meth:`lock` keeps them out.

        :meth:`complete` and :meth:`abandon` do so by themselves.
        """
        self._lock.release()

    def claim(self, identity: Mapping[str, Any]) -> Found:
        """Make the folders ready to be written to, before any work is done.

        The folder must be locked. ``identity``, of JSON values, says what is prepared:
        what an interrupted run left is kept if it was the same, and removed otherwise.

        Raises:
            ConfigurationError: the folder cannot be created or written to.
        """
        found = Found.NOTHING
        try:
            if os.path.lexists(self.journal.folder):
                if self.journal.begun:
                    same = self.journal.begun_with(identity)
                    found = Found.SAME if same else Found.OTHER
                if found is not Found.SAME:
                    self._remove_own_files()
                    self.journal.remove()
            # Written again also where it is the same: that shows whether it can be.
            self.journal.begin(identity)
            for folder in self._folders:
                folder.mkdir(exist_ok=True)
        except OSError as error:
            # What can be continued is kept.
            self.claimed = found is not Found.SAME
            with contextlib.suppress(OSError):
                self.abandon()
            raise self._refusal(error) from None
        self.claimed = True
        return found

    def write_tokenizer(self, text: str, chat_template: str | None) -> None:
        """Put the tokenizer, and the template if there is one, beside the shards. Raises
        ``OSError``."""
        for folder in self._folders:
            write_text(folder / TOKENIZER_NAME, text)
            if chat_template is not None:
                write_text(folder / CHAT_TEMPLATE_NAME, chat_template)

    def holds(self, result: UnitResult) -> bool:
        """Whether a unit's shards lie in the folders as they were recorded."""
        try:
            return all(
                path.stat().st_size == shard.bytes and file_sha256(path) == shard.sha256
                for path, shard in self._shards_of(result)
            )
        except OSError:
            return False

    def keep_only(self, finished: Sequence[UnitResult]) -> None:
        """Remove whatever is ours but belongs to no finished unit, but for what was put
        beside the shards.

        Raises:
            OSError: a file cannot be removed.
        """
        self.journal.keep_only([result.unit for result in finished])
        kept = {
            folder / name
            for folder in (self.folder, self.val_folder)
            for name in (TOKENIZER_NAME, CHAT_TEMPLATE_NAME)
        }
        kept |= {path for unit in finished for path, _ in self._shards_of(unit)}
        for path in self._own_files():
            if path not in kept:
                path.unlink()

    def _shards_of(self, result: UnitResult) -> list[tuple[Path, ShardRecord]]:
        """Where a unit's shards lie, and what they were recorded to be."""
        sides = ((self.folder, result.train), (self.val_folder, result.val))
        return [
            (folder / split.shard.name, split.shard)
            for folder, split in sides
            if split.shard is not None
        ]

    def complete(self, *manifests: Manifest) -> None:
        """Write the manifests, that of the train set last, and close the journal.

        Raises:
            OSError: a file cannot be written.
        """
        for folder, manifest in zip(self._folders, manifests, strict=True):
            # A manifest must not reach the disk before the names of its shards.
            sync(folder)
            manifest.write()
            sync(folder)
        self.claimed = False
        self.journal.remove()
        self.release()

    def abandon(self) -> None:
        """Remove what :meth:`claim` and later work wrote, and the folder if left empty."""
        if self.claimed:
            self.claimed = False
            self._remove_own_files()
            self.journal.remove()
            self.release()
            self._remove_if_empty()
        self.release()

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _refusal(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"cannot write to --output {self.folder}: {error.strerror}"
        )

    def _own_files(self) -> list[Path]:
        return [
            path
            for folder in (self.val_folder, self.folder)
            if folder.is_dir()
            for path in folder.iterdir()
            if _OWN_FILE.fullmatch(path.name)
        ]

    def _remove_own_files(self) -> None:
        for path in self._own_files():
            path.unlink()
        if self.val_folder.is_dir() and not any(self.val_folder.iterdir()):
            self.val_folder.rmdir()


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

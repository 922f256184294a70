"""The output folder: claimed before work, continued where it stopped, completed last.

A folder in preparation holds a journal. Only a folder that is empty or has a journal is
ever written to, so nothing of the user's can be lost; and what a killed run finished is
recognised and kept, what it did not finish is replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from data_prep.journal import JOURNAL_NAME, Journal, UnitResult
from data_prep.lock import FolderLock
from ten_dist.data.manifest import MANIFEST_NAME, Manifest
from ten_dist.data.tokenizer import TOKENIZER_NAME, file_sha256
from ten_dist.data.verify import verify_shards
from ten_dist.errors import ConfigurationError
from ten_dist.files import sync, write_text

VAL_FOLDER = "val"
_OWN_FILE = re.compile(r"(shard-\d{5,}\.tar|manifest\.json|tokenizer\.json)(\.tmp)?")


class Found(Enum):
    """What a folder held when it was claimed."""

    NOTHING = "nothing"
    SAME = "what an interrupted preparation of the same left: it can be continued"
    OTHER = "what an interrupted preparation of something else left: it was removed"


class Output:
    """An output folder, and ``val_folder`` within it for the held-out set.

    ``claimed`` says, on the rank that claimed it, whether the folder is in preparation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.val_folder = folder / VAL_FOLDER
        self.journal = Journal(folder)
        self._lock = FolderLock(folder)
        self.claimed = False

    def prepared(self, source_sha256: str, val: bool) -> Manifest | None:
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
            verify_shards(manifest, full=False)
            if val:
                verify_shards(Manifest.load(self.val_folder), full=False)
            self.journal.remove()
            return manifest
        if JOURNAL_NAME not in names and any(
            not name.startswith(".") for name in names
        ):
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

    def claim(self, identity: Mapping[str, Any], val: bool) -> Found:
        """Make the folders ready to be written to, before any work is done.

        The folder must be locked. ``identity``, of JSON values, says what is prepared: what an interrupted run
        left is kept if it was the same, and removed otherwise.

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
            if val:
                self.val_folder.mkdir(exist_ok=True)
        except OSError as error:
            # What can be continued is kept.
            self.claimed = found is not Found.SAME
            with contextlib.suppress(OSError):
                self.abandon()
            raise self._refusal(error) from None
        self.claimed = True
        return found

    def write_tokenizer(self, text: str, val: bool) -> None:
        """Put the tokenizer beside the shards. Raises ``OSError``."""
        for folder in [self.folder, *([self.val_folder] if val else [])]:
            write_text(folder / TOKENIZER_NAME, text)

    def holds(self, result: UnitResult) -> bool:
        """Whether a unit's shards lie in the folders as they were recorded."""
        splits = ((self.folder, result.train), (self.val_folder, result.val))
        for folder, split in splits:
            shard = split.shard
            if shard is None:
                continue
            path = folder / shard.name
            try:
                if path.stat().st_size != shard.bytes:
                    return False
                if file_sha256(path) != shard.sha256:
                    return False
            except OSError:
                return False
        return True

    def keep_only(self, finished: Sequence[UnitResult]) -> None:
        """Remove whatever is ours but belongs to no finished unit, the tokenizer apart.

        Raises:
            OSError: a file cannot be removed.
        """
        self.journal.keep_only([result.unit for result in finished])
        kept = {self.folder / TOKENIZER_NAME, self.val_folder / TOKENIZER_NAME}
        for result in finished:
            if result.train.shard is not None:
                kept.add(self.folder / result.train.shard.name)
            if result.val.shard is not None:
                kept.add(self.val_folder / result.val.shard.name)
        for path in self._own_files():
            if path not in kept:
                path.unlink()

    def complete(self, train: Manifest, val: Manifest | None) -> None:
        """Write the manifests, that of the train set last, and close the journal.

        Raises:
            OSError: a file cannot be written.
        """
        if val is not None:
            sync(self.val_folder)
            val.write()
            sync(self.val_folder)
        # A manifest must not reach the disk before the names of its shards.
        sync(self.folder)
        train.write()
        sync(self.folder)
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

"""The output folder: claimed before work, completed last, or left as it was found.

A folder in preparation holds a marker file. Only a folder that is empty or has the
marker is ever written to, so nothing of the user's can be lost; and what a killed run
left behind is recognised and replaced.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ten_dist.data.manifest import MANIFEST_NAME, Manifest
from ten_dist.data.verify import verify_shards
from ten_dist.errors import ConfigurationError

VAL_FOLDER = "val"
_MARKER = ".preparing"
_OWN_FILE = re.compile(r"(shard-\d{5,}\.tar|manifest\.json|tokenizer\.json)(\.tmp)?")


class Output:
    """An output folder, and ``val_folder`` within it for the held-out set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.val_folder = folder / VAL_FOLDER
        self._claimed = False

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
            (self.folder / _MARKER).unlink(missing_ok=True)
            return manifest
        if _MARKER not in names and any(not name.startswith(".") for name in names):
            raise ConfigurationError(
                f"--output {self.folder} is not empty and holds no prepared data: "
                "choose a new or empty folder"
            )
        return None

    def claim(self, val: bool) -> bool:
        """Make the folders ready to be written to, before any work is done.

        Returns:
            Whether a run that did not end had left something here; it is removed.

        Raises:
            ConfigurationError: the folder cannot be created or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            interrupted = (self.folder / _MARKER).exists()
            if interrupted:
                self._remove_own_files()
            (self.folder / _MARKER).touch()
            self._claimed = True
            if val:
                self.val_folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to --output {self.folder}: {error.strerror}"
            ) from None
        return interrupted

    def complete(self) -> None:
        """Mark the folder as complete, once its manifest is written."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        (self.folder / _MARKER).unlink()
        self._claimed = False

    def abandon(self) -> None:
        """Remove what was written since :meth:`claim`, and the folder if that empties it."""
        if not self._claimed:
            return
        self._remove_own_files()
        (self.folder / _MARKER).unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove_own_files(self) -> None:
        for folder in (self.val_folder, self.folder):
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                if _OWN_FILE.fullmatch(path.name):
                    path.unlink()
        if self.val_folder.is_dir() and not any(self.val_folder.iterdir()):
            self.val_folder.rmdir()

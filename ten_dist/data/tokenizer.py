"""The tokenizer kept beside the shards."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tokenizers import Tokenizer

from ten_dist.data.manifest import PREPARE_COMMAND, Manifest
from ten_dist.data.remote import RemotePath
from ten_dist.errors import DataError

TOKENIZER_NAME = "tokenizer.json"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hex. Raises ``OSError`` where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_tokenizer(manifest: Manifest) -> bytes:
    """The content of a set's ``tokenizer.json``, checked against the manifest.

    Raises:
        DataError: it cannot be read, or is another one.
    """
    path, expected = manifest.tokenizer_path, manifest.tokenizer_sha256
    try:
        if isinstance(path, RemotePath):
            return path.read_bytes(sha256=expected)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {path} ({error.strerror}): copy it again, or "
            f"prepare the data again with `{PREPARE_COMMAND}`"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(
            f"{path} is not the tokenizer that these shards were made with (its sha256 "
            "is not the manifest's): put the original back, or prepare the data again "
            f"with `{PREPARE_COMMAND}`"
        )
    return content


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a ``tokenizer.json``, or the one in a folder.

    Raises:
        DataError: there is none, or it is not a tokenizer of the ``tokenizers``
            library.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a tokenizer.json: it is not UTF-8") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - what the library raises is no subclass
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a tokenizer.json: {reason}") from None

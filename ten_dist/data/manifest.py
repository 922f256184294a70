"""The manifest of a token set: which shards it has, and what they must contain."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ten_dist.data.remote import RemoteAccess
from ten_dist.data.storage import Location, is_url, locate
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import write_json

MANIFEST_NAME = "manifest.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
FORMAT = "ten_dist.tokens"
VERSION = 1
BLOCK_TOKENS = 65536
"""Tokens in a block, the unit in which a shard is read; a shard's last may be shorter."""
PREPARE_COMMAND = "python -m data_prep.shard"
_DTYPES = ("uint16", "uint32")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest token dtype that holds ids below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardRecord:
    """One tar shard: file name, tokens in it, size in bytes, sha256 of the file."""

    name: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete token set: the stream of tokens is its shards, joined in order.

    ``documents`` and ``text_bytes`` (UTF-8 bytes, for bits per byte) describe the text
    behind the tokens. ``source`` records what the set was made from; it is no part of
    the set's identity, which is :attr:`fingerprint`.
    """

    directory: Location
    shards: tuple[ShardRecord, ...]
    documents: int
    text_bytes: int
    dtype: str
    vocab_size: int
    tokenizer_file: str
    tokenizer_sha256: str
    separator_token: str
    separator_id: int
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    counted_tokens: int | None = None
    """Tokens that the loss mask of the blocks counts; None where there is no mask."""
    chat_template_sha256: str | None = None
    """Of the set's ``chat_template.jinja``; None where it has none."""

    @cached_property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides what a model trained on this sees.

        Two sets with one fingerprint hold the same tokens in the same order, whatever
        they are called and wherever they lie.
        """
        content = {
            "shards": [[shard.tokens, shard.sha256] for shard in self.shards],
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_sha256,
            "separator": self.separator_id,
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of the tokens in the shards, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def tokenizer_path(self) -> Location:
        """Where the set's ``tokenizer.json`` lies."""
        return self.directory / self.tokenizer_file

    @property
    def masked(self) -> bool:
        """Whether blocks have a loss mask: a bit a token, whether it counts as a target."""
        return self.counted_tokens is not None

    @property
    def chat_template_path(self) -> Location:
        """Where the set's ``chat_template.jinja`` lies, if it has one."""
        return self.directory / CHAT_TEMPLATE_NAME

    def shard_path(self, index: int) -> Location:
        """Where shard ``index`` lies."""
        return self.directory / self.shards[index].name

    def rows(self, seq_len: int) -> int:
        """Rows of ``seq_len`` inputs and one more target token each, in one epoch.

        Raises:
            ConfigurationError: ``seq_len`` is not positive.
            DataError: the set is too small for one row.
        """
        if seq_len < 1:
            raise ConfigurationError(f"--seq_len must be at least 1, not {seq_len}")
        rows = (self.tokens - 1) // seq_len
        if rows < 1:
            raise DataError(
                f"{self.directory} has {self.tokens} tokens, too few for one row of "
                f"--seq_len {seq_len}: choose --seq_len {max(self.tokens - 1, 1)} or "
                "less, or prepare more data"
            )
        return rows

    def write(self) -> None:
        """Write ``manifest.json`` into :attr:`directory`: complete, or not at all.

        Raises:
            TypeError: the set is behind a URL.
        """
        if not isinstance(self.directory, Path):
            raise TypeError(f"{self.directory} is read only")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "shards": [vars(shard) for shard in self.shards],
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": {
                "file": self.tokenizer_file,
                "sha256": self.tokenizer_sha256,
            },
            "separator": {"token": self.separator_token, "id": self.separator_id},
            "fingerprint": self.fingerprint,
            "source": dict(self.source),
        }
        # Named only where they are: other sets stay what they are to the byte.
        if self.masked:
            content["loss_mask"] = {"counted_tokens": self.counted_tokens}
        if self.chat_template_sha256 is not None:
            content["chat_template"] = {"sha256": self.chat_template_sha256}
        write_json(self.directory / MANIFEST_NAME, content)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str] | Location,
        access: RemoteAccess | None = None,
    ) -> Manifest:
        """Read and check the manifest of a folder or URL; no shard is opened.

        Args:
            directory: path or URL.
            access: how files of a URL are fetched, now and later.

        Raises:
            DataError: the folder has no manifest, or one that is not valid JSON, of
                another format or version, incomplete, or inconsistent with itself.
        """
        directory = locate(directory, access)
        path = directory / MANIFEST_NAME
        try:
            return _parse(directory, json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{directory} has no {MANIFEST_NAME}: give a folder, or the URL of one, "
                f"that `{PREPARE_COMMAND}` has completed"
            ) from None
        except OSError as error:
            advice = "the URL and its server" if is_url(path) else "its permissions"
            raise DataError(
                f"cannot read {path} ({error.strerror}): check {advice}"
            ) from None
        except ValueError as error:
            raise DataError(
                f"{path} is not valid JSON ({error}): prepare the data again with "
                f"`{PREPARE_COMMAND}`"
            ) from None
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path} is not a valid manifest: {reason}") from None
        except _Inconsistent as error:
            raise DataError(f"{path}: {error}") from None


class _Inconsistent(Exception):
    """A manifest contradicts itself; the message says how, the caller says where."""


def _integer(content: Mapping[str, Any], key: str, minimum: int) -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise _Inconsistent(f"{key} must be an integer >= {minimum}, not {value!r}")
    return value


def _file_name(value: Any) -> str:
    # A name with a path in it could make a reader open files outside the folder.
    if (
        not isinstance(value, str)
        or value in ("", ".", "..")
        or set(value) & set("/\\")
    ):
        raise _Inconsistent(f"{value!r} is not a plain file name")
    return value


def _sha256(value: Any) -> str:
    # The name of a file in a cache.
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _Inconsistent(f"{value!r} is not a sha256 in hex")
    return value


def _parse(directory: Location, content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _Inconsistent(f"its format is not {FORMAT!r}: it is some other manifest")
    if content["version"] != VERSION:
        raise _Inconsistent(
            f"version {content['version']!r} of the format cannot be read here, only "
            f"{VERSION}: prepare the data again with `{PREPARE_COMMAND}`"
        )
    shards = tuple(
        ShardRecord(
            name=_file_name(shard["name"]),
            tokens=_integer(shard, "tokens", 1),
            bytes=_integer(shard, "bytes", 1),
            sha256=_sha256(shard["sha256"]),
        )
        for shard in content["shards"]
    )
    if not shards:
        raise _Inconsistent("it lists no shards")
    if len({shard.name for shard in shards}) != len(shards):
        raise _Inconsistent("it lists a shard twice")
    manifest = Manifest(
        directory=directory,
        shards=shards,
        documents=_integer(content, "documents", 0),
        text_bytes=_integer(content, "text_bytes", 0),
        dtype=content["dtype"],
        vocab_size=_integer(content, "vocab_size", 1),
        tokenizer_file=_file_name(content["tokenizer"]["file"]),
        tokenizer_sha256=_sha256(content["tokenizer"]["sha256"]),
        separator_token=str(content["separator"]["token"]),
        separator_id=_integer(content["separator"], "id", 0),
        source=content.get("source") or {},
        counted_tokens=(
            _integer(content["loss_mask"], "counted_tokens", 1)
            if "loss_mask" in content
            else None
        ),
        chat_template_sha256=(
            _sha256(content["chat_template"]["sha256"])
            if "chat_template" in content
            else None
        ),
    )
    if manifest.dtype not in _DTYPES:
        raise _Inconsistent(
            f"dtype must be one of {', '.join(_DTYPES)}, not {manifest.dtype!r}"
        )
    if manifest.separator_id >= manifest.vocab_size:
        raise _Inconsistent(
            f"the separator's id {manifest.separator_id} is outside the vocabulary of "
            f"{manifest.vocab_size}"
        )
    if content["tokens"] != manifest.tokens:
        raise _Inconsistent(
            f"it claims {content['tokens']} tokens, its shards have {manifest.tokens}"
        )
    if content["fingerprint"] != manifest.fingerprint:
        raise _Inconsistent(
            "its fingerprint is not that of its contents: it was edited or damaged; "
            f"copy it again or prepare the data again with `{PREPARE_COMMAND}`"
        )
    return manifest

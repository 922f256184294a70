"""Checking that a token set is what its manifest says, before a run relies on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from ten_dist.data.manifest import PREPARE_COMMAND, Manifest
from ten_dist.data.shards import damaged, shard_blocks
from ten_dist.data.tokenizer import file_sha256
from ten_dist.errors import DataError


def verify_shards(
    manifest: Manifest, rank: int = 0, world_size: int = 1, *, full: bool = True
) -> None:
    """Check the tokenizer, and shards ``rank::world_size``, against the manifest.

    Every rank checks its share; an error is raised only on the ranks that find one, so
    the caller must tell the others. With ``full`` each shard is hashed and decoded;
    without, only its presence and size are checked.

    Raises:
        DataError: the tokenizer or a shard is missing, truncated, altered, unreadable,
            or has another number of tokens or a token id outside the vocabulary; it
            names the file and what to do.
    """
    _verify_tokenizer(manifest)
    for index in range(rank, len(manifest.shards), world_size):
        _verify_shard(manifest, index, full)


def damages(
    manifest: Manifest, tick: Callable[[int], None] = lambda tokens: None
) -> Iterator[DataError]:
    """Everything that is wrong with a set: all of its files are read.

    Where every shard is whole, the separators in them are counted as well: there must
    be one for each document.

    Args:
        manifest: the set.
        tick: told of the tokens of each shard that has been looked at.
    """
    try:
        _verify_tokenizer(manifest)
    except DataError as error:
        yield error
    whole, separators = True, 0
    for index, record in enumerate(manifest.shards):
        try:
            separators += _verify_shard(manifest, index, full=True)
        except DataError as error:
            whole = False
            yield error
        tick(record.tokens)
    if whole and separators != manifest.documents:
        yield DataError(
            f"{manifest.directory} has {separators} separators, its manifest says "
            f"{manifest.documents} documents: prepare the data again with "
            f"`{PREPARE_COMMAND}`"
        )


def _verify_tokenizer(manifest: Manifest) -> None:
    path = manifest.tokenizer_path
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {path} ({error.strerror}): copy it again, or "
            f"prepare the data again with `{PREPARE_COMMAND}`"
        ) from None
    if found != manifest.tokenizer_sha256:
        raise DataError(
            f"{path} is not the tokenizer that these shards were made with (its sha256 "
            "is not the manifest's): put the original back, or prepare the data again "
            f"with `{PREPARE_COMMAND}`"
        )


def _verify_shard(manifest: Manifest, index: int, full: bool) -> int:
    """Check a shard; returns how many separators it has, where it is read at all."""
    record = manifest.shards[index]
    path = manifest.shard_path(index)
    try:
        size = os.path.getsize(path)
        if size < record.bytes:
            raise damaged(
                manifest, index, f"is truncated ({size} of {record.bytes} bytes)"
            )
        if size > record.bytes:
            raise damaged(
                manifest, index, f"is altered ({size} bytes, not {record.bytes})"
            )
        if not full:
            return 0
        altered = file_sha256(path) != record.sha256
    except FileNotFoundError:
        raise damaged(manifest, index, "is missing") from None
    except OSError as error:
        raise damaged(manifest, index, f"cannot be read ({error.strerror})") from None
    if altered:
        raise damaged(manifest, index, "is altered (its sha256 is not the manifest's)")
    tokens, separators = 0, 0
    for block in shard_blocks(manifest, index):
        tokens += block.size
        separators += int(np.count_nonzero(block == manifest.separator_id))
    if tokens != record.tokens:
        raise damaged(
            manifest, index, f"has {tokens} tokens, the manifest says {record.tokens}"
        )
    return separators

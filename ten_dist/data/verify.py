"""Checking that a token set is what its manifest says, before a run relies on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ten_dist.data.chat_template import read_chat_template
from ten_dist.data.documents import document_lengths
from ten_dist.data.manifest import PREPARE_COMMAND, Manifest
from ten_dist.data.remote import RemotePath
from ten_dist.data.shards import (
    COUNTED,
    damaged,
    shard_blocks,
    token_ids,
    wrong_length,
)
from ten_dist.data.tokenizer import file_sha256, read_tokenizer, set_tokenizer
from ten_dist.errors import ConfigurationError, DataError

CUTS_ARE_EXACT = 3
"""Layout, in a set's source, from which on long documents are cut where that is exact."""
_SHORTEST_THAT_WAS_CUT = 8192
"""Tokens that 131,072 characters of prose, from which on documents were cut, take."""
_AGAIN = f"prepare the data again with `{PREPARE_COMMAND}` into another folder"
_CONCURRENT_REQUESTS = 16


def verify_shards(
    manifest: Manifest,
    rank: int = 0,
    world_size: int = 1,
    *,
    full: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Check the tokenizer, and shards ``rank::world_size``, against the manifest.

    Every rank checks its share; an error is raised only on the ranks that find one, so
    the caller must tell the others. With ``full`` each local shard is hashed and
    decoded; without, or behind a URL, only its presence and size are checked: a shard
    of a server is hashed whenever it is fetched. ``tick`` is called after each shard.

    Returns:
        Separators in the shards that were decoded.

    Raises:
        DataError: the tokenizer or a shard is missing, truncated, altered, unreadable,
            or has another number of tokens or a token id outside the vocabulary; it
            names the file and what to do.
    """
    read_tokenizer(manifest)
    read_chat_template(manifest)
    share = range(rank, len(manifest.shards), world_size)
    if not isinstance(manifest.directory, RemotePath):
        separators = 0
        for index in share:
            separators += _verify_shard(manifest, index, full)[0]
            tick()
        return separators
    pool = ThreadPoolExecutor(_CONCURRENT_REQUESTS)
    try:
        for _ in pool.map(lambda index: _verify_shard(manifest, index, False), share):
            tick()
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


def damages(
    manifest: Manifest, tick: Callable[[int], object] = lambda tokens: None
) -> Iterator[DataError]:
    """Everything that is wrong with a set: all of its files are read.

    Where every shard is whole, there must be a separator for each document, and as many
    tokens that the loss mask counts as the manifest says. ``tick`` is
    told of the tokens of each shard that has been looked at.
    """
    for read in (read_tokenizer, read_chat_template):
        try:
            read(manifest)
        except DataError as error:
            yield error
    whole, separators, counted = True, 0, 0
    for index, record in enumerate(manifest.shards):
        try:
            found = _verify_shard(manifest, index, full=True)
            separators, counted = separators + found[0], counted + found[1]
        except DataError as error:
            whole = False
            yield error
        tick(record.tokens)
    if whole and separators != manifest.documents:
        yield miscounted(manifest, separators)
    if whole and manifest.masked and counted != manifest.counted_tokens:
        yield DataError(
            f"{manifest.directory} has a loss mask that counts {counted} tokens, its "
            f"manifest says {manifest.counted_tokens}: {_AGAIN}"
        )
    if whole:
        yield from _wrongly_prepared(manifest)


def miscounted(manifest: Manifest, separators: int) -> DataError:
    """The error of a set that has another number of separators than of documents."""
    return DataError(
        f"{manifest.directory} has {separators} separators, its manifest says "
        f"{manifest.documents} documents: {_AGAIN}"
    )


def _wrongly_prepared(manifest: Manifest) -> Iterator[DataError]:
    """What earlier preparations did wrong without a word, in a set that is whole."""
    try:
        tokenizer = set_tokenizer(manifest)
    except ConfigurationError as error:
        yield DataError(
            f"{manifest.directory}: the separator {manifest.separator_token!r} can come "
            f"out of text ({error}): {_AGAIN}, and name another token with --separator"
        )
        return
    named = manifest.source.get("separator") is not None
    if not tokenizer.has_clear_separator and not named:
        yield DataError(
            f"{manifest.directory}: the separator {manifest.separator_token!r} was not "
            "asked for and is no special token, so that text may mean something else by "
            f"it: {_AGAIN}, and name the token that ends documents with --separator"
        )
    layout = manifest.source.get("layout", CUTS_ARE_EXACT)
    if layout >= CUTS_ARE_EXACT or tokenizer.in_bytes:
        return
    longest = document_lengths(manifest).longest
    if longest > _SHORTEST_THAT_WAS_CUT:
        yield DataError(
            f"{manifest.directory} has documents of up to {longest:,} tokens, which an "
            "earlier version encoded in pieces: some tokens at their ends may not be "
            f"those of the whole document: {_AGAIN}"
        )


def _verify_shard(manifest: Manifest, index: int, full: bool) -> tuple[int, int]:
    """Check a shard; returns how many separators it has, and how many tokens that its
    mask counts, where it is read at all."""
    record = manifest.shards[index]
    path = manifest.shard_path(index)
    try:
        size = path.stat().st_size if isinstance(path, Path) else path.size()
        if size is not None and size != record.bytes:
            what = f"is altered ({size} bytes, not {record.bytes})"
            if size < record.bytes:
                what = f"is truncated ({size} of {record.bytes} bytes)"
            raise damaged(manifest, index, what)
        if not full:
            return 0, 0
        # What a server sends is hashed as it comes, in reading the blocks.
        altered = isinstance(path, Path) and file_sha256(path) != record.sha256
    except FileNotFoundError:
        raise damaged(manifest, index, "is missing") from None
    except OSError as error:
        raise damaged(manifest, index, f"cannot be read ({error.strerror})") from None
    if altered:
        raise damaged(manifest, index, "is altered (its sha256 is not the manifest's)")
    tokens = separators = counted = 0
    for block in shard_blocks(manifest, index):
        tokens += block.size
        ids = token_ids(block, manifest.masked)
        separators += int(np.count_nonzero(ids == manifest.separator_id))
        if manifest.masked:
            counted += int(np.count_nonzero(block & COUNTED))
    if tokens != record.tokens:
        raise wrong_length(manifest, index, tokens)
    return separators, counted

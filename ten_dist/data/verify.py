"""Checking that a token set is what its manifest says, before a run relies on it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ten_dist.data.manifest import Manifest
from ten_dist.data.remote import RemotePath
from ten_dist.data.shards import damaged, shard_blocks
from ten_dist.data.storage import file_size
from ten_dist.data.tokenizer import file_sha256, read_tokenizer

_CONCURRENT_REQUESTS = 16


def verify_shards(
    manifest: Manifest, rank: int = 0, world_size: int = 1, *, full: bool = True
) -> None:
    """Check the tokenizer, and shards ``rank::world_size``, against the manifest.

    Every rank checks its share; an error is raised only on the ranks that find one, so
    the caller must tell the others. With ``full`` each local shard is hashed and
    decoded; without, or behind a URL, only its presence and size are checked: a shard
    of a server is hashed whenever it is fetched.

    Raises:
        DataError: the tokenizer or a shard is missing, truncated, altered, unreadable,
            or has another number of tokens or a token id outside the vocabulary; it
            names the file and what to do.
    """
    read_tokenizer(manifest)
    share = range(rank, len(manifest.shards), world_size)
    if not isinstance(manifest.directory, RemotePath):
        for index in share:
            _verify_shard(manifest, index, full)
        return
    pool = ThreadPoolExecutor(_CONCURRENT_REQUESTS)
    try:
        for _ in pool.map(lambda index: _verify_shard(manifest, index, False), share):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _verify_shard(manifest: Manifest, index: int, full: bool) -> None:
    record = manifest.shards[index]
    path = manifest.shard_path(index)
    try:
        size = file_size(path)
        if size is None:
            return
        if size < record.bytes:
            raise damaged(
                manifest, index, f"is truncated ({size} of {record.bytes} bytes)"
            )
        if size > record.bytes:
            raise damaged(
                manifest, index, f"is altered ({size} bytes, not {record.bytes})"
            )
        if not full:
            return
        altered = file_sha256(path) != record.sha256
    except FileNotFoundError:
        raise damaged(manifest, index, "is missing") from None
    except OSError as error:
        raise damaged(manifest, index, f"cannot be read ({error.strerror})") from None
    if altered:
        raise damaged(manifest, index, "is altered (its sha256 is not the manifest's)")
    tokens = sum(block.size for block in shard_blocks(manifest, index))
    if tokens != record.tokens:
        raise damaged(
            manifest, index, f"has {tokens} tokens, the manifest says {record.tokens}"
        )

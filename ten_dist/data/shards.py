"""Reading tokens out of webdataset tar shards."""

from __future__ import annotations

import functools
import io
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from webdataset.tariterators import tar_file_expander

from ten_dist.data.manifest import PREPARE_COMMAND, Manifest
from ten_dist.data.prefetch import Prefetch
from ten_dist.data.remote import RemotePath
from ten_dist.data.storage import open_shard_file
from ten_dist.errors import DataError

BLOCK_MEMBER = "tokens.npy"
"""Extension of a block in a shard; its key is the block's index, eight digits."""
MASK_MEMBER = "mask.npy"
"""Extension of the loss mask of a block, which follows it: bits, packed as by numpy."""
COUNTED = np.uint32(1 << 31)
"""The bit of a marked token, uint32, that says that it counts as a target."""
DEFAULT_CACHED_TOKENS = 1 << 26
_HEAD_TOKENS = 1 << 22


def damaged(manifest: Manifest, index: int, what: str) -> DataError:
    """The error for shard ``index``, which names the file and what to do about it."""
    path = manifest.shard_path(index)
    advice = (
        "see that the server can be reached and has the file as it was prepared"
        if isinstance(path, RemotePath)
        else "copy it again from where the data was prepared, or prepare it again, in a "
        f"new folder, with `{PREPARE_COMMAND}`"
    )
    return DataError(f"{path} {what}: {advice}")


def wrong_length(manifest: Manifest, index: int, tokens: int) -> DataError:
    """The error for shard ``index`` that has another number of tokens."""
    expected = manifest.shards[index].tokens
    return damaged(
        manifest, index, f"has {tokens} tokens, the manifest says {expected}"
    )


def shard_blocks(manifest: Manifest, index: int) -> Iterator[np.ndarray]:
    """Yield the token blocks of shard ``index`` in order: 1-D, as stored.

    Blocks with a loss mask come as marked tokens, uint32, the others as uint16/uint32.
    :func:`token_ids` has the ids of both.

    Raises:
        DataError: the shard is missing, cannot be read as a webdataset tar, has a block
            or mask out of place or of another dtype or length, or a token id outside the
            vocabulary.
    """
    position = 0
    try:
        members = _members(manifest, index)
        for member in members:
            block = _array(manifest, index, member, f"{position:08d}.{BLOCK_MEMBER}")
            if block.dtype != manifest.numpy_dtype or block.ndim != 1:
                found = f"{block.dtype}{list(block.shape)}"
                what = f"has a block of {found}, not {manifest.dtype}"
                raise damaged(manifest, index, what)
            largest, size = int(block.max(initial=0)), manifest.vocab_size
            if largest >= size:
                what = f"has a token id {largest} outside the vocabulary of {size}"
                raise damaged(manifest, index, what)
            if manifest.masked:
                name = f"{position:08d}.{MASK_MEMBER}"
                packed = _array(manifest, index, next(members, {}), name)
                if packed.dtype != np.uint8 or packed.shape != (-(-block.size // 8),):
                    what = f"has a mask {name} that is not of its block"
                    raise damaged(manifest, index, what)
                block = marked(block, np.unpackbits(packed, count=block.size))
            yield block
            position += 1
    except DataError:
        raise
    except FileNotFoundError:
        raise damaged(manifest, index, "is missing") from None
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        # webdataset appends objects of its own to the arguments, for debugging.
        first = str(error.args[0]) if error.args else type(error).__name__
        reason = getattr(error, "strerror", None) or first.split(" @ ")[0]
        raise damaged(manifest, index, f"cannot be read ({reason})") from None


def marked(tokens: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Marked tokens, uint32 [n], of ids and of whether each counts, [n] each."""
    return tokens.astype(np.uint32) | counted.astype(np.uint32) * COUNTED


def token_ids(stored: np.ndarray, masked: bool) -> np.ndarray:
    """The ids of tokens, which are marked where their set is ``masked``."""
    return stored & ~COUNTED if masked else stored


def _array(
    manifest: Manifest, index: int, member: dict[str, Any], name: str
) -> np.ndarray:
    """The array of a member, which must have that name."""
    found = member.get("fname", "nothing")
    if found != name:
        raise damaged(manifest, index, f"has {found} in the place of {name}")
    return np.load(io.BytesIO(member["data"]), allow_pickle=False)


def _members(manifest: Manifest, index: int) -> Iterator[dict[str, Any]]:
    # Opened here rather than by webdataset, which would take a path with a colon for a
    # URL, or for a shell command. Not grouped into samples, which have one member each:
    # grouping reads one member ahead.
    path, record = manifest.shard_path(index), manifest.shards[index]
    with open_shard_file(path, record.bytes, record.sha256) as stream:
        source = {"url": str(path), "stream": stream}
        yield from tar_file_expander([source], eof_value=None)


def read_shard(manifest: Manifest, index: int) -> np.ndarray:
    """All tokens of shard ``index``, 1-D, as :func:`shard_blocks` has them.

    Raises:
        DataError: as :func:`shard_blocks`, or the shard's token count is not the
            manifest's.
    """
    expected = manifest.shards[index].tokens
    tokens = np.empty(expected, dtype=_stored_dtype(manifest))
    filled = 0
    for block in shard_blocks(manifest, index):
        if filled + block.size <= expected:
            tokens[filled : filled + block.size] = block
        filled += block.size
    if filled != expected:
        raise wrong_length(manifest, index, filled)
    return tokens


def _stored_dtype(manifest: Manifest) -> np.dtype:
    return np.dtype(np.uint32) if manifest.masked else manifest.numpy_dtype


class TokenReader:
    """Random access to the stream of tokens: all shards joined in manifest order.

    Decoded shards are kept, least recently used out first, while they total at most
    ``cached_tokens`` tokens; the one in use is always kept. Of shards behind a URL the
    first tokens are kept for longer: a row that runs over into a shard needs no more,
    but that shard would have to be fetched as a whole, to be hashed. Shards behind a URL
    that are said to come next are fetched by a thread meanwhile.
    """

    def __init__(
        self, manifest: Manifest, cached_tokens: int = DEFAULT_CACHED_TOKENS
    ) -> None:
        self.manifest = manifest
        self.cached_tokens = cached_tokens
        counts = [shard.tokens for shard in manifest.shards]
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._remote = isinstance(manifest.directory, RemotePath)
        self._heads: OrderedDict[int, np.ndarray] = OrderedDict()
        self._longest_read = 0
        self._ahead: Prefetch[np.ndarray] = Prefetch()

    def expect(self, shards: Iterable[int]) -> None:
        """Say which shards will be read next: those behind a URL are fetched meanwhile.

        They take as much memory again as the shards themselves, until they are read or
        no longer expected.
        """
        if self._remote:
            self._ahead.expect(
                {
                    index: functools.partial(read_shard, self.manifest, index)
                    for index in map(int, shards)
                    if index not in self._cache
                }
            )

    def close(self) -> None:
        """Fetch nothing more ahead."""
        self._ahead.close()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the stream, 1-D, uint16 or uint32, a copy.

        Raises:
            ValueError, DataError: as :meth:`read_stored`.
        """
        stored = self.read_stored(start, stop)
        return token_ids(stored, self.manifest.masked).astype(
            self.manifest.numpy_dtype, copy=False
        )

    def read_stored(self, start: int, stop: int) -> np.ndarray:
        """The same as :func:`shard_blocks` has them: marked where the set is masked.

        Raises:
            ValueError: the range is not within the stream.
            DataError: a shard that it touches is missing or damaged.
        """
        if not 0 <= start <= stop <= self.manifest.tokens:
            raise ValueError(
                f"tokens {start}:{stop} are not within a stream of "
                f"{self.manifest.tokens}"
            )
        self._longest_read = max(self._longest_read, stop - start)
        result = np.empty(stop - start, dtype=_stored_dtype(self.manifest))
        position = start
        while position < stop:
            index = int(np.searchsorted(self._offsets, position, side="right")) - 1
            first = position - int(self._offsets[index])
            count = min(stop - position, self.manifest.shards[index].tokens - first)
            # A range that runs over into this shard needs no more than its head, and
            # the rest of the shard may not be wanted for a long time.
            continued = position > start
            if continued and count < self.manifest.shards[index].tokens:
                piece = self._head(index, count)
            else:
                piece = self._whole(index)[first : first + count]
            result[position - start : position - start + count] = piece
            position += count
        return result

    def _fits(self, index: int) -> bool:
        """Whether a shard has room beside those that are kept."""
        held = sum(tokens.size for tokens in self._cache.values())
        return held + self.manifest.shards[index].tokens <= self.cached_tokens

    def _whole(self, index: int) -> np.ndarray:
        if index not in self._cache:
            while self._cache and not self._fits(index):
                self._cache.popitem(last=False)
            ahead = self._ahead.get(index)
            tokens = read_shard(self.manifest, index) if ahead is None else ahead
            self._ahead.drop(index)
            self._cache[index] = tokens
            self._keep_head(index, tokens)
        self._cache.move_to_end(index)
        return self._cache[index]

    def _keep_head(self, index: int, tokens: np.ndarray) -> None:
        if not self._remote:
            return
        # A copy: a view would hold on to the whole shard.
        self._heads[index] = tokens[: self._longest_read].copy()
        self._heads.move_to_end(index)
        while sum(head.size for head in self._heads.values()) > _HEAD_TOKENS:
            self._heads.popitem(last=False)

    def _head(self, index: int, count: int) -> np.ndarray:
        if index in self._cache:
            return self._cache[index][:count]
        if index in self._heads and self._heads[index].size >= count:
            return self._heads[index][:count]
        ahead = self._ahead.get(index)
        if ahead is not None:
            return ahead[:count]
        if self._remote and self._fits(index):
            # Of a server's shard the whole has come, to be hashed: no need to ask for
            # it twice if the rest is wanted next.
            return self._whole(index)[:count]
        head = np.empty(0, dtype=_stored_dtype(self.manifest))
        for block in shard_blocks(self.manifest, index):
            head = np.concatenate([head, block])
            if head.size >= count:
                self._keep_head(index, head)
                return head[:count]
        raise wrong_length(self.manifest, index, head.size)

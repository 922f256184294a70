"""Turning one unit of the corpus into its train shard and its held-out shard."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import numpy as np
from webdataset import TarWriter

from data_prep.conversations import Conversation
from data_prep.documents import Selection, unit_documents
from data_prep.journal import Split, UnitResult
from data_prep.pieces import cuts_of
from data_prep.ranks import Tick
from data_prep.segment import Segment
from data_prep.text_document import Document
from ten_dist.data.manifest import BLOCK_TOKENS, ShardRecord, token_dtype
from ten_dist.data.shards import BLOCK_MEMBER, COUNTED, MASK_MEMBER, token_ids
from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import DataError
from ten_dist.files import removed_on_error

K = TypeVar("K")

BATCH_CHARACTERS = 1 << 19
"""Characters from which a batch of texts to encode is full."""
_BATCHES_AT_ONCE = 2
_BATCHES_AHEAD = 3


def shard_name(unit: int) -> str:
    """File name of a unit's shard: the unit's number, so never that of a rank."""
    return f"shard-{unit:05d}.tar"


class ShardWriter:
    """Writes token blocks to a tar shard, which appears under its name when complete.

    Where it is ``masked``, tokens are marked, and a loss mask follows each block. The
    tar's bytes are a function of the tokens alone. Used as a context manager: left
    by an exception, it removes what it wrote.
    """

    def __init__(self, path: Path, dtype: str, masked: bool = False) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masked = masked
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._blocks = 0
        self._tokens = 0
        self._file: _HashingFile | None = None
        self._tar: TarWriter | None = None

    def __enter__(self) -> ShardWriter:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if kind is not None and self._tar is not None and self._file is not None:
            # A tar left open would write its end when it is garbage-collected. That can
            # fail again, on a full disk, but the error that matters is raised already.
            with contextlib.suppress(OSError):
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens, 1-D integers that fit the shard's dtype, or marked ones."""
        dtype = np.dtype(np.uint32) if self._masked else self._dtype
        self._pending.append(tokens.astype(dtype))
        self._pending_tokens += tokens.size
        if self._pending_tokens >= BLOCK_TOKENS:
            joined = np.concatenate(self._pending)
            whole = joined.size - joined.size % BLOCK_TOKENS
            for start in range(0, whole, BLOCK_TOKENS):
                self._write_block(joined[start : start + BLOCK_TOKENS])
            self._pending = [joined[whole:]]
            self._pending_tokens = joined.size - whole

    def finish(self) -> ShardRecord | None:
        """Complete the shard; None, and no file, if there were no tokens."""
        if self._pending_tokens:
            self._write_block(np.concatenate(self._pending))
        if self._tar is None or self._file is None:
            return None
        with removed_on_error(self._temporary):
            self._tar.close()
            self._file.close()
            os.replace(self._temporary, self._path)
        return ShardRecord(
            self._path.name, self._tokens, self._file.bytes, self._file.sha256
        )

    def _write_block(self, block: np.ndarray) -> None:
        ids = token_ids(block, self._masked).astype(self._dtype, copy=False)
        members = {BLOCK_MEMBER: ids}
        if self._masked:
            members[MASK_MEMBER] = np.packbits((block & COUNTED) != 0)
        key = f"{self._blocks:08d}"
        with removed_on_error(self._temporary):
            if self._tar is None:
                self._file = _HashingFile(open(self._temporary, "wb"))  # noqa: SIM115
                self._tar = TarWriter(
                    self._file, user="", group="", mode=0o444, mtime=0
                )
            # One by one: a sample is written in the order of its names.
            for name, array in members.items():
                encoded = io.BytesIO()
                np.save(encoded, array, allow_pickle=False)
                self._tar.write({"__key__": key, name: encoded.getvalue()})
            # The tar keeps a record of each member that it has written, for no use here.
            self._tar.tarstream.members.clear()
        self._blocks += 1
        self._tokens += block.size


class _HashingFile:
    """A file being written in one pass, with its size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


@dataclass(frozen=True)
class UnitWriter:
    """How the units of a corpus become shards of a train set and of a held-out set."""

    folder: Path
    val_folder: Path
    tokenizer: TextTokenizer
    val_fraction: float
    selection: Selection

    def write(
        self,
        unit: int,
        segments: Sequence[Segment],
        duplicates: np.ndarray | None,
        tick: Tick,
    ) -> UnitResult:
        """Tokenize the segments of a unit.

        ``duplicates`` are the documents to leave out, by number: 1-D, ascending.

        Raises:
            DataError: the corpus has a malformed line or has changed.
            OSError: a file cannot be read or written.
        """
        result = UnitResult(unit)
        name, dtype = shard_name(unit), token_dtype(self.tokenizer.vocab_size)
        masked = self.selection.chat is not None
        with (
            ShardWriter(self.folder / name, dtype, masked) as train,
            ShardWriter(self.val_folder / name, dtype, masked) as val,
        ):
            documents = unit_documents(
                segments, self.selection, result.left_out, duplicates, tick
            )
            sides = _Sides(result, train, val, self.val_fraction)
            add = self._add_conversations if masked else self._add_texts
            add(documents, sides, tick)
            result.train.shard = train.finish()
            result.val.shard = val.finish()
        return result

    def _add_texts(
        self, documents: Iterable[Document], sides: _Sides, tick: Tick
    ) -> None:
        cuts = cuts_of(self.tokenizer)

        def texts() -> Iterator[tuple[ShardWriter, str | None]]:
            """Pieces of documents, and None for the end of each, by where they go."""
            for document in documents:
                split, writer = sides.of(document)
                split.documents += 1
                split.text_bytes += document.bytes
                for piece in document.pieces(cuts):
                    yield writer, piece
                yield writer, None

        with contextlib.closing(encode_in_order(texts(), self.tokenizer)) as batches:
            for batch in batches:
                for writer, tokens in batch:
                    writer.add(tokens)
                tick(0, sum(tokens.size for _, tokens in batch))

    def _add_conversations(
        self, documents: Iterable[Document], sides: _Sides, tick: Tick
    ) -> None:
        left_out = sides.result.left_out
        for document in documents:
            assert isinstance(document, Conversation)
            try:
                tokens = document.tokens(self.tokenizer)
            except DataError as error:
                place = document.place._replace(note=str(error))
                left_out.add("no_conversation", place)
                continue
            ends = int(
                np.count_nonzero(tokens & ~COUNTED == self.tokenizer.separator_id)
            )
            if ends > 1:
                left_out.add("separator_within", document.place)
            split, writer = sides.of(document)
            split.documents += ends
            split.text_bytes += document.bytes
            split.counted_tokens += int(np.count_nonzero(tokens & COUNTED))
            writer.add(tokens)
            tick(0, tokens.size)


@dataclass(frozen=True)
class _Sides:
    """The two sides of the held-out split of a unit, and what writes them."""

    result: UnitResult
    train: ShardWriter
    val: ShardWriter
    val_fraction: float

    def of(self, document: Document) -> tuple[Split, ShardWriter]:
        """Where a document goes."""
        if document.is_held_out(self.val_fraction):
            return self.result.val, self.val
        return self.result.train, self.train


def encode_in_order(
    texts: Iterable[tuple[K, str | None]], tokenizer: TextTokenizer
) -> Generator[list[tuple[K, np.ndarray]]]:
    """Encode texts, each with a key, in threads; None stands for the separator.

    ``texts`` is read in the calling thread, a few batches ahead of what is yielded. The
    tokenizer keeps all cores busy with one batch until it comes to the last and longest
    of its texts; so a second batch is under way at the same time.

    Yields:
        (key, tokens) of each text, in order, a batch at a time; tokens are 1-D uint32.
    """
    with ThreadPoolExecutor(_BATCHES_AT_ONCE, "encode") as threads:
        under_way: deque = deque()
        for batch in _batches(texts):
            if len(under_way) == _BATCHES_AHEAD:
                yield under_way.popleft().result()
            under_way.append(threads.submit(_encode, tokenizer, batch))
        for encoded in under_way:
            yield encoded.result()


def _batches(
    texts: Iterable[tuple[K, str | None]],
) -> Iterator[list[tuple[K, str | None]]]:
    batch, characters = [], 0
    for key, text in texts:
        batch.append((key, text))
        characters += len(text or "")
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _encode(
    tokenizer: TextTokenizer, batch: list[tuple[K, str | None]]
) -> list[tuple[K, np.ndarray]]:
    encoded = iter(tokenizer.encode([text for _, text in batch if text is not None]))
    separator = np.array([tokenizer.separator_id], dtype=np.uint32)
    return [(key, separator if text is None else next(encoded)) for key, text in batch]

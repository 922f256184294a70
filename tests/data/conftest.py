"""Small token sets, on disk and only described."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from data_prep.writer import ShardWriter
from ten_dist.data import Manifest, ShardRecord, file_sha256
from ten_dist.data.tokenizer import SEPARATOR, byte_tokenizer


@pytest.fixture(scope="session")
def described_set():
    """Function: shard sizes in tokens -> a manifest without files."""

    def describe(*sizes, **changes):
        shards = tuple(
            ShardRecord(
                f"shard-{index:05d}.tar",
                size,
                2 * size,
                hashlib.sha256(f"{index} {size}".encode()).hexdigest(),
            )
            for index, size in enumerate(sizes)
        )
        values = {
            "directory": "nowhere",
            "shards": shards,
            "documents": 3,
            "text_bytes": 100,
            "dtype": "uint16",
            "vocab_size": 257,
            "tokenizer_file": "tokenizer.json",
            "tokenizer_sha256": "0" * 64,
            "separator_token": SEPARATOR,
            "separator_id": 256,
        }
        return Manifest(**{**values, **changes})

    return describe


@pytest.fixture(scope="session")
def write_set(described_set):
    """Function: folder, shard sizes -> (manifest, all its tokens), written to disk.

    Blocks are of 65536 tokens, so a shard of more has several.
    """

    def write(folder, *sizes, vocab_size=257, dtype="uint16"):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(sum(sizes))
        tokens = generator.integers(0, vocab_size, sum(sizes))
        tokenizer = folder / "tokenizer.json"
        byte_tokenizer().save(str(tokenizer))
        shards, start = [], 0
        for index, size in enumerate(sizes):
            with ShardWriter(folder / f"shard-{index:05d}.tar", dtype) as writer:
                writer.add(tokens[start : start + size])
                shards.append(writer.finish())
            start += size
        manifest = described_set(
            directory=folder,
            shards=tuple(shards),
            dtype=dtype,
            vocab_size=vocab_size,
            tokenizer_sha256=file_sha256(tokenizer),
        )
        manifest.write()
        return Manifest.load(folder), tokens

    return write

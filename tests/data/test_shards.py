"""Reading shards, and noticing every kind of damage to them."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from webdataset import TarWriter, WebDataset

from ten_dist.data import (
    TokenReader,
    file_sha256,
    token_counts,
    unigram_loss,
    verify_shards,
)
from ten_dist.data.tokenizer import read_tokenizer_file, set_tokenizer
from ten_dist.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def token_set(tmp_path_factory, write_set):
    return write_set(tmp_path_factory.mktemp("tokens"), 140000, 10, 70000, 1, 500)


@pytest.mark.parametrize("cached_tokens", [0, 140000, 10**9])
def test_reader_gives_any_piece_of_the_stream(token_set, cached_tokens):
    manifest, tokens = token_set
    reader = TokenReader(manifest, cached_tokens)
    ends = [0, 1, 65536, 131072, 140000, 140010, 209000, 210010, 210011, 210511]
    for start in ends:
        for stop in (end for end in ends if end >= start):
            np.testing.assert_array_equal(reader.read(start, stop), tokens[start:stop])
    for start, stop in [(-1, 5), (5, 4), (0, 210512)]:
        with pytest.raises(ValueError, match="not within"):
            reader.read(start, stop)


def test_a_row_that_runs_over_a_shard_end_reads_the_head_of_the_next(
    tmp_path, write_set
):
    """Damage behind the head of the second shard is out of such a row's way."""
    manifest, tokens = write_set(tmp_path, 1000, 200000)
    path = tmp_path / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:200000])
    reader = TokenReader(manifest)
    np.testing.assert_array_equal(reader.read(900, 1100), tokens[900:1100])
    with pytest.raises(DataError, match=r"shard-00001\.tar"):
        reader.read(1000, 1100)


def test_a_returned_piece_is_a_copy(token_set):
    reader = TokenReader(token_set[0])
    first = reader.read(0, 10)
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(reader.read(0, 10), expected)


def test_tokens_above_16_bits(tmp_path, write_set):
    manifest, tokens = write_set(tmp_path, 5000, vocab_size=100000, dtype="uint32")
    assert tokens.max() > 65535
    np.testing.assert_array_equal(TokenReader(manifest).read(0, 5000), tokens)
    verify_shards(manifest)


def test_shards_are_plain_webdataset_shards(token_set):
    """A reader that knows nothing of this project gets the blocks with webdataset."""
    manifest, tokens = token_set
    dataset = WebDataset(str(manifest.shard_path(0)), shardshuffle=False, empty_check=0)
    blocks = [
        np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        for sample in dataset
    ]
    assert [block.size for block in blocks] == [65536, 65536, 140000 - 131072]
    np.testing.assert_array_equal(np.concatenate(blocks), tokens[:140000])


def overwrite(path, blocks, keys=None, member="tokens.npy"):
    """Replace a shard by one of these blocks."""
    keys = keys or [f"{index:08d}" for index in range(len(blocks))]
    with open(path, "wb") as file, TarWriter(file, mtime=0) as tar:
        for key, block in zip(keys, blocks, strict=True):
            encoded = io.BytesIO()
            np.save(encoded, block)
            tar.write({"__key__": key, member: encoded.getvalue()})


def agreeing(manifest, index):
    """The manifest with the size and hash of what now lies in shard ``index``.

    It is what a wrong shard written by a faulty program, hash and all, looks like.
    """
    path = manifest.shard_path(index)
    record = dataclasses.replace(
        manifest.shards[index], bytes=path.stat().st_size, sha256=file_sha256(path)
    )
    shards = list(manifest.shards)
    shards[index] = record
    return dataclasses.replace(manifest, shards=tuple(shards))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHANGES = {
    "missing": (lambda path: path.unlink(), "is missing", True),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-512]),
        "is truncated",
        True,
    ),
    "longer": (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "altered",
        True,
    ),
    "altered": (flip, "sha256", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_shards_are_noticed(tmp_path, write_set, change):
    manifest, _ = write_set(tmp_path, 3000, 3000, 3000)
    verify_shards(manifest)
    damage, expected, seen_without_reading = CHANGES[change]
    damage(tmp_path / "shard-00001.tar")
    with pytest.raises(DataError, match=rf"shard-00001\.tar.*{expected}.*data_prep"):
        verify_shards(manifest)
    if seen_without_reading:
        with pytest.raises(DataError, match=r"shard-00001\.tar"):
            verify_shards(manifest, full=False)
    else:
        verify_shards(manifest, full=False)


def test_ranks_share_the_check(tmp_path, write_set):
    manifest, _ = write_set(tmp_path, 300, 300, 300)
    (tmp_path / "shard-00001.tar").unlink()
    verify_shards(manifest, 0, 2)
    with pytest.raises(DataError, match="shard-00001"):
        verify_shards(manifest, 1, 2)


BLOCK = np.arange(3000, dtype=np.uint16) % 257
WRONG = {
    "too few tokens": (lambda p: overwrite(p, [BLOCK[:-1]]), "has 2999 tokens"),
    "too many tokens": (lambda p: overwrite(p, [BLOCK, BLOCK[:1]]), "has 3001 tokens"),
    "token id": (
        lambda p: overwrite(p, [BLOCK + 1]),
        "token id 257.*vocabulary of 257",
    ),
    "dtype": (lambda p: overwrite(p, [BLOCK.astype("int64")]), "int64"),
    "shape": (lambda p: overwrite(p, [BLOCK.reshape(2, -1)]), r"\[2, 1500\]"),
    "order": (
        lambda p: overwrite(p, [BLOCK[:99], BLOCK[99:]], ["00000001", "00000000"]),
        "00000001.tokens.npy in the place of 00000000",
    ),
    "member": (
        lambda p: overwrite(p, [BLOCK], member="other.npy"),
        "other.npy in the place",
    ),
    "not npy": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"NUMPY", b"NOTPY")),
        "cannot be read",
    ),
    "not a tar": (lambda p: p.write_bytes(b"junk" * 9999), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_contents_are_noticed(tmp_path, write_set, kind):
    """By the check of a whole set, and by the reader, each on its own."""
    manifest, _ = write_set(tmp_path, 3000, 3000)
    damage, expected = WRONG[kind]
    damage(tmp_path / "shard-00001.tar")
    with pytest.raises(DataError, match=rf"shard-00001\.tar.*{expected}") as caught:
        TokenReader(manifest).read(3500, 3600)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=rf"shard-00001\.tar.*{expected}"):
        verify_shards(agreeing(manifest, 1))


def test_the_tokenizer_must_be_the_one_of_the_shards(tmp_path, write_set):
    manifest, _ = write_set(tmp_path, 300)
    path = tmp_path / "tokenizer.json"
    assert set_tokenizer(manifest).vocab_size == 257
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        verify_shards(manifest)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        read_tokenizer_file(path, "--tokenizer")
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read tokenizer .*tokenizer\.json"):
        verify_shards(manifest, full=False)
    with pytest.raises(ConfigurationError, match="--tokenizer cannot be read"):
        read_tokenizer_file(tmp_path, "--tokenizer")


def test_unigram_model(token_set):
    manifest, tokens = token_set
    counts = token_counts(manifest)
    np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=257))
    # Uniform tokens: about log V. A token never seen still has a probability.
    assert unigram_loss(counts, counts) == pytest.approx(math.log(257), abs=0.01)
    train, val = np.array([3, 0, 1]), np.array([1, 1, 0])
    expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    assert unigram_loss(train, val) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="vocab|ids"):
        unigram_loss(train, counts)
    with pytest.raises(ValueError, match="no tokens"):
        unigram_loss(train, np.zeros(3, dtype=np.int64))

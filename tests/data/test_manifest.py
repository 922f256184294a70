"""The manifest: what is written is read back, and what is damaged is refused."""

from __future__ import annotations

import json

import pytest

from ten_dist.data import Manifest
from ten_dist.errors import ConfigurationError, DataError


def edit(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_was_written_is_read_back(tmp_path, described_set):
    manifest = described_set(
        500, 400, directory=tmp_path, source={"files": 3}, separator_token="</s>"
    )
    manifest.write()
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.source == {"files": 3}
    assert (loaded.tokens, loaded.fingerprint) == (900, manifest.fingerprint)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_file_has_the_documented_fields(tmp_path, described_set):
    described_set(5, 4, directory=tmp_path).write()
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["format"] == "ten_dist.tokens" and content["version"] == 1
    assert content["shards"][0].keys() == {"name", "tokens", "bytes", "sha256"}
    assert content["tokenizer"] == {"file": "tokenizer.json", "sha256": "0" * 64}
    assert content["separator"] == {"token": "<|endoftext|>", "id": 256}
    assert content["tokens"] == 9 and content["text_bytes"] == 100
    assert content["dtype"] == "uint16" and content["vocab_size"] == 257


def test_rows(described_set):
    assert described_set(101).rows(10) == 10
    assert described_set(100).rows(10) == 9
    with pytest.raises(DataError, match="--seq_len 100"):
        described_set(100).rows(100)
    with pytest.raises(ConfigurationError, match="--seq_len"):
        described_set(100).rows(0)


def test_a_folder_without_manifest_names_the_command(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError) as caught:
            Manifest.load(folder)
        assert str(folder) in str(caught.value)
        assert "data_prep.shard" in str(caught.value)


DAMAGES = {
    "format": (lambda c: c.update(format="other"), "format"),
    "version": (lambda c: c.update(version=99), "version 99"),
    "total": (lambda c: c.update(tokens=1), "claims 1 tokens"),
    "field": (lambda c: c.pop("dtype"), "dtype"),
    "shard field": (lambda c: c["shards"][0].pop("sha256"), "sha256"),
    "dtype": (lambda c: c.update(dtype="float32"), "float32"),
    "no shards": (lambda c: c.update(shards=[], tokens=0), "no shards"),
    "twice": (lambda c: c["shards"][1].update(name="shard-00000.tar"), "twice"),
    "path": (lambda c: c["shards"][0].update(name="../x.tar"), "plain file name"),
    "count": (lambda c: c["shards"][0].update(tokens=-5), "tokens must be"),
    "separator": (lambda c: c["separator"].update(id=999), "separator"),
    "type": (lambda c: c.update(tokenizer="x"), "manifest"),
    "hash": (lambda c: c["shards"][0].update(sha256="f" * 64), "fingerprint"),
    "vocabulary": (lambda c: c.update(vocab_size=300), "fingerprint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(tmp_path, described_set, damage):
    described_set(500, 400, directory=tmp_path).write()
    change, expected = DAMAGES[damage]
    edit(tmp_path, change)
    with pytest.raises(DataError, match=expected) as caught:
        Manifest.load(tmp_path)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.load(tmp_path)

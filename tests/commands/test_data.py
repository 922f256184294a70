"""Looking at token shards: ten-dist data inspect, verify and sample."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ten_dist.cli import main
from ten_dist.data import Manifest, TokenReader
from tests.tools.serving import FaultyServer

ROOT = Path(__file__).resolve().parents[2]


def output_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def copy_of_data(token_data, tmp_path):
    return shutil.copytree(token_data, tmp_path / "data")


def documents_of(manifest):
    tokens = TokenReader(manifest).read(0, manifest.tokens)
    return np.split(tokens, np.flatnonzero(tokens == manifest.separator_id) + 1)[:-1]


def test_inspect_counts_documents_and_their_lengths(capsys, token_data):
    train, val = json.loads(output_of(capsys, "inspect", token_data, "--json"))
    for described, folder in ((train, token_data), (val, token_data / "val")):
        manifest = Manifest.load(folder)
        lengths = [document.size for document in documents_of(manifest)]
        assert described["documents"] == len(lengths) == manifest.documents
        found = described["document_tokens"]
        assert found["documents"] == len(lengths)
        assert found["shortest"] == min(lengths) and found["longest"] == max(lengths)
        assert found["mean"] == pytest.approx(np.mean(lengths))
        for exponent, count in enumerate(found["histogram"]):
            least = 2 ** (exponent - 1)
            assert count == sum(least < n <= 2**exponent for n in lengths)
        assert described["bytes_per_token"] == manifest.text_bytes / manifest.tokens


def test_inspect_is_readable(capsys, token_data):
    output = output_of(capsys, "inspect", token_data)
    manifest = Manifest.load(token_data)
    assert f"{manifest.tokens:,} in {len(manifest.shards)} shards" in output
    assert manifest.fingerprint in output and "val" in output


def test_verify_names_every_fault(capsys, copy_of_data):
    assert "is whole" in output_of(capsys, "verify", copy_of_data)
    manifest = Manifest.load(copy_of_data)
    short, altered, gone = (manifest.shard_path(i) for i in range(3))
    short.write_bytes(short.read_bytes()[:-100])
    content = bytearray(altered.read_bytes())
    content[1000] ^= 1
    altered.write_bytes(content)
    gone.unlink()
    (copy_of_data / "tokenizer.json").write_text("{}")
    assert main(["data", "verify", str(copy_of_data)]) == 2
    lines = capsys.readouterr().err.splitlines()
    faults = ("not the tokenizer", "truncated", "altered", "missing", "4 faults")
    assert len(lines) == len(faults)
    assert all(fault in line for fault, line in zip(faults, lines))
    assert all(str(path) in line for path, line in zip((short, altered), lines[1:]))


def test_verify_counts_the_documents(capsys, copy_of_data):
    path = copy_of_data / "manifest.json"
    content = json.loads(path.read_text())
    content["documents"] += 1
    path.write_text(json.dumps(content))
    assert main(["data", "verify", str(copy_of_data)]) == 2
    assert "separators" in capsys.readouterr().err


def test_samples_are_whole_documents_of_the_set(capsys, token_data):
    output = output_of(
        capsys, "sample", token_data, "--count", 5, "--max_tokens", 100000
    )
    texts = {
        bytes(document[:-1].astype(np.uint8)).decode()
        for document in documents_of(Manifest.load(token_data))
    }
    shown = output.split("--- ")[1:]
    assert len(shown) == 5
    for sample in shown:
        header, text = sample.split("\n", 1)
        assert text.removesuffix("\n") in texts
        assert header.startswith("shard-") and header.endswith(" tokens")
    again = output_of(
        capsys, "sample", token_data, "--count", 5, "--max_tokens", 100000
    )
    assert again == output
    short = output_of(capsys, "sample", token_data, "--count", 1, "--max_tokens", 7)
    assert "the first 7 of" in short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere has no manifest.json"),
        (["sample", "DATA", "--count", "0"], "--count must be from 1"),
        (["sample", "DATA", "--seed", "-1"], "--seed must be 0 or more"),
    ],
)
def test_refusals(capsys, token_data, arguments, message):
    arguments = [str(token_data) if a == "DATA" else a for a in arguments]
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def server(token_data, monkeypatch):
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(token_data) as server:
        yield server


def test_a_cache_keeps_what_was_looked_at(capsys, server, tmp_path):
    cache = ["--data_cache", tmp_path / "cache"]
    first = output_of(capsys, "inspect", server.url, *cache)
    fetched = server.gets(".tar")
    assert output_of(capsys, "inspect", server.url, *cache) == first
    assert "---" in output_of(capsys, "sample", server.url, *cache)
    assert server.gets(".tar") == fetched
    assert main(["data", "inspect", str(server.folder), *map(str, cache)]) == 2
    assert "--data_cache has no effect with local" in capsys.readouterr().err
    limit = ["--data_cache_gigabytes", "1e-6"]
    assert main(["data", "inspect", server.url, *map(str, cache), *limit]) == 2
    assert "does not hold the largest shard" in capsys.readouterr().err


def test_an_interrupt_ends_it_at_once(server):
    """Also while it waits for a server that says nothing."""
    server.fail("shard-00000.tar", "stall")
    process = subprocess.Popen(
        [sys.executable, "-m", "ten_dist.cli", "data", "verify", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not server.gets("shard-00000.tar"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    # The server goes on saying nothing for longer than this.
    said, errors = process.communicate(timeout=25)
    assert process.returncode == 130
    assert (said, errors) == ("", "ten-dist: interrupted\n")

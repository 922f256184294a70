"""The cache of remote shards: filled once, bounded, shared, and never trusted blindly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ten_dist.data import (
    BatchShape,
    Manifest,
    RemoteAccess,
    ShardCache,
    TokenReader,
    training_batches,
)
from ten_dist.errors import ConfigurationError, DataError
from tests.tools.serving import FaultyServer

pytest.importorskip("aiohttp", reason="aiohttp of the extra `remote` is not installed")
ROOT = Path(__file__).resolve().parents[2]
SHARDS = 6
TOKENS = 3000


@pytest.fixture(scope="module")
def token_set(tmp_path_factory, write_set):
    return write_set(tmp_path_factory.mktemp("tokens"), *[TOKENS] * SHARDS)


@pytest.fixture
def server(token_set, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(token_set[0].directory) as server:
        yield server


def remote_set(server, folder, limit_bytes=None):
    access = RemoteAccess(
        ShardCache(folder, limit_bytes),
        timeout_seconds=5,
        attempts=3,
        first_wait_seconds=0.01,
    )
    return Manifest.load(server.url, access)


def read_all(manifest):
    return TokenReader(manifest).read(0, manifest.tokens)


def cached(folder):
    return sorted(folder.glob("*.tar"))


def test_a_filled_cache_needs_no_request(token_set, server, tmp_path):
    _, tokens = token_set
    manifest = remote_set(server, tmp_path / "cache")
    np.testing.assert_array_equal(read_all(manifest), tokens)
    assert server.gets(".tar") == SHARDS
    assert len(cached(tmp_path / "cache")) == SHARDS
    np.testing.assert_array_equal(read_all(manifest), tokens)
    # Another run, and another set with the same shards.
    np.testing.assert_array_equal(
        read_all(remote_set(server, tmp_path / "cache")), tokens
    )
    assert server.gets(".tar") == SHARDS


@pytest.mark.parametrize("damage", ["altered", "cut", "empty", "longer"])
def test_a_damaged_file_is_fetched_again(token_set, server, tmp_path, capfd, damage):
    manifest = remote_set(server, tmp_path)
    read_all(manifest)
    path = cached(tmp_path)[2]
    content = path.read_bytes()
    flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    changed = {
        "altered": flipped,
        "cut": content[:-512],
        "empty": b"",
        "longer": content + b"x",
    }
    path.write_bytes(changed[damage])
    np.testing.assert_array_equal(read_all(manifest), token_set[1])
    assert path.read_bytes() == content
    assert server.gets(".tar") == SHARDS + 1
    assert f"{path} is damaged" in capfd.readouterr().err


def test_the_limit_holds_and_the_least_recently_used_go(token_set, server, tmp_path):
    manifest, tokens = remote_set(server, tmp_path), token_set[1]
    size = manifest.shards[0].bytes
    manifest = remote_set(server, tmp_path, limit_bytes=3 * size + size // 2)
    paths = {
        index: tmp_path / f"{shard.sha256}.tar"
        for index, shard in enumerate(manifest.shards)
    }

    def read(index):
        start = index * TOKENS
        piece = TokenReader(manifest).read(start, start + 10)
        np.testing.assert_array_equal(piece, tokens[start : start + 10])
        time.sleep(0.02)
        held = cached(tmp_path)
        assert sum(path.stat().st_size for path in held) <= 3 * size + size // 2
        return {index for index, path in paths.items() if path in held}

    assert [read(index) for index in (0, 1, 2)] == [{0}, {0, 1}, {0, 1, 2}]
    assert read(0) == {0, 1, 2}
    assert read(3) == {0, 2, 3}
    assert read(4) == {0, 3, 4}


def test_other_files_in_the_folder_are_left_alone(server, tmp_path):
    kept = [tmp_path / "thesis.tar", tmp_path / "notes.tmp"]
    for path in kept:
        path.write_bytes(b"x" * 100000)
    manifest = remote_set(server, tmp_path)
    read_all(remote_set(server, tmp_path, limit_bytes=manifest.shards[0].bytes))
    assert all(path.stat().st_size == 100000 for path in kept)
    assert len(list(tmp_path.glob("*.tar"))) == 2


def test_wrong_bytes_are_not_kept(server, tmp_path):
    manifest = remote_set(server, tmp_path)
    server.fail("shard-00000.tar", "wrong", times=99)
    with pytest.raises(DataError, match="sha256"):
        TokenReader(manifest).read(0, 10)
    assert not cached(tmp_path)


def test_what_cannot_be_kept_is_used_all_the_same(
    token_set, server, tmp_path, monkeypatch, capfd
):
    manifest, tokens = remote_set(server, tmp_path), token_set[1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    np.testing.assert_array_equal(read_all(manifest), tokens)
    assert "does not take a shard: No space left" in capfd.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tar", ".tmp")]


def test_a_cache_that_cannot_work_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--data_cache .* cannot be made"):
        ShardCache(tmp_path / "file" / "cache").check(1000)
    with pytest.raises(ConfigurationError, match="--data_cache_gigabytes 1e-06"):
        ShardCache(tmp_path / "cache", 1000).check(1001)
    ShardCache(tmp_path / "cache", 1000).check(1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


READ = """
import hashlib, json, sys
from pathlib import Path
from ten_dist.data import Manifest, RemoteAccess, ShardCache, TokenReader
cache = ShardCache(Path(sys.argv[2]), int(sys.argv[3]) or None)
manifest = Manifest.load(sys.argv[1], RemoteAccess(cache))
print("ready", flush=True)
sys.stdin.readline()
digests = [
    hashlib.sha256(TokenReader(manifest).read(0, manifest.tokens).tobytes()).hexdigest()
    for _ in range(int(sys.argv[4]))
]
print(json.dumps(digests))
"""


def start_reader(server, folder, limit_bytes=0, times=1):
    """Start a process that reads the set `times` times, once it is told to."""
    arguments = [server.url, folder, limit_bytes, times]
    return subprocess.Popen(
        [sys.executable, "-c", READ, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def let_read(*readers):
    """Have them read at the same time."""
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()


def digests_of(processes):
    let_read(*processes)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return {digest for output in outputs for digest in json.loads(output)}


@pytest.mark.slow
def test_processes_share_what_each_fetches(token_set, server, tmp_path):
    readers = [start_reader(server, tmp_path) for _ in range(3)]
    assert len(digests_of(readers)) == 1
    assert server.gets(".tar") == SHARDS
    assert len(cached(tmp_path)) == SHARDS


@pytest.mark.slow
def test_processes_that_push_each_other_out_read_on(token_set, server, tmp_path):
    """A cache too small for what is read: slow, but right, and within its limit."""
    size = token_set[0].shards[0].bytes
    readers = [start_reader(server, tmp_path, 2 * size, 5) for _ in range(3)]
    digests = digests_of(readers)
    assert len(digests) == 1
    assert len(cached(tmp_path)) == 2
    assert server.gets(".tar") > SHARDS


def test_what_a_killed_process_left_is_cleaned_up(token_set, server, tmp_path):
    server.fail("shard-00003.tar", "stall")
    reader = start_reader(server, tmp_path)
    let_read(reader)
    deadline = time.monotonic() + 60
    while not server.gets("shard-00003.tar"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    assert len(cached(tmp_path)) == 3
    # Had it been killed a moment later, while it wrote.
    half = tmp_path / f"{token_set[0].shards[4].sha256}.tar.tmp"
    half.write_bytes(b"x" * 1000)
    # Its lock went with it.
    np.testing.assert_array_equal(read_all(remote_set(server, tmp_path)), token_set[1])
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == SHARDS + 1 and "locks" in names
    assert all(re.fullmatch(r"[0-9a-f]{64}\.tar", name) for name in names - {"locks"})


def test_workers_share_the_cache(server, tmp_path):
    manifest = remote_set(server, tmp_path)
    shape, options = BatchShape(100, 4), {"seed": 1, "last_step": 40}
    inline = [b.tokens.tolist() for b in training_batches(manifest, shape, **options)]
    fetched = server.gets(".tar")
    assert fetched == SHARDS
    forked = training_batches(manifest, shape, **options, num_workers=3)
    assert [b.tokens.tolist() for b in forked] == inline
    assert server.gets(".tar") == fetched

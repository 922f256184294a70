"""Token sets behind a URL: the same tokens as from a folder, whatever the server does."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from ten_dist.cli import main
from ten_dist.data import (
    BatchShape,
    Manifest,
    RemoteAccess,
    RowOrder,
    TokenReader,
    evaluation_batches,
    held_out_set,
    token_counts,
    training_batches,
    verify_shards,
)
from ten_dist.errors import DataError
from tests.tools.serving import FaultyServer

pytest.importorskip("aiohttp", reason="aiohttp of the extra `remote` is not installed")
SHAPE = BatchShape(1000, 4, 1, 2)
ACCESS = RemoteAccess(timeout_seconds=20, attempts=4, first_wait_seconds=0.01)
IMPATIENT = dataclasses.replace(ACCESS, timeout_seconds=1)
SIZES = (900, 1500, 3, 2000, 1000, 700, 71000, 1300, 2500, 4000, 50, 800)


@pytest.fixture(scope="module")
def token_set(tmp_path_factory, write_set):
    """(manifest, tokens) of 12 shards on disk, and held-out ones in val/."""
    folder = tmp_path_factory.mktemp("tokens")
    write_set(folder / "val", 3000)
    return write_set(folder, *SIZES)


@pytest.fixture
def server(token_set, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(token_set[0].directory) as server:
        yield server


def batches_of(manifest, shape=SHAPE, **changes):
    options = {"seed": 5, "last_step": 15, "num_workers": 0}
    return [
        (b.step, b.micro_step, b.epochs.tolist(), b.rows.tolist(), b.tokens.tolist())
        for b in training_batches(manifest, shape, **{**options, **changes})
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(token_set, server, workers):
    local = token_set[0]
    remote = Manifest.load(server.url + "/", ACCESS)
    assert remote.fingerprint == local.fingerprint
    assert str(remote.shard_path(3)) == f"{server.url}/shard-00003.tar"
    verify_shards(remote)
    assert batches_of(remote, num_workers=workers) == batches_of(local)


def test_after_the_first_epoch_each_shard_is_fetched_once_an_epoch(
    tmp_path, write_set, monkeypatch
):
    """Though rows run over into shards whose turn is long past, or yet to come."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shards = 40
    local, _ = write_set(tmp_path, *[2050 + n for n in range(shards)])
    steps = local.rows(100) // 8
    shape = BatchShape(100, 8)
    fetched = []
    for epochs in (1, 3):
        with FaultyServer(tmp_path) as server:
            batches = training_batches(
                Manifest.load(server.url, ACCESS),
                shape,
                seed=5,
                last_step=epochs * steps,
                num_workers=0,
            )
            tokens = [batch.tokens.tolist() for batch in batches]
            fetched.append(server.gets(".tar"))
    # Of the epoch that would come next, eight at most are fetched ahead already.
    assert shards <= fetched[0] < 1.8 * shards + 8
    # One more at most: of the batch in which two epochs meet.
    assert fetched[1] < 1.8 * shards + 2 * (shards + 1) + 8
    expected = batches_of(local, shape, last_step=3 * steps)
    assert tokens == [batch[-1] for batch in expected]


def test_the_next_shards_are_fetched_while_those_of_now_are_read(
    tmp_path, write_set, monkeypatch
):
    """Twice eight are there before the rows of the first eight are through."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    local, _ = write_set(tmp_path, *[2050] * 40)
    shape = BatchShape(100, 8)
    steps = local.rows(100) // 8
    order = RowOrder(local, 100, 5)
    order.rows(0, 1)
    ahead = {("GET", f"/{local.shards[n].name}") for n in order.shards_ahead()}
    assert len(ahead) == 16
    with FaultyServer(tmp_path) as server:
        remote = Manifest.load(server.url, ACCESS)
        batches = training_batches(
            remote,
            shape,
            seed=5,
            last_step=steps,
            num_workers=0,
        )
        read = [next(batches).tokens.tolist()]
        deadline = time.monotonic() + 30
        while not ahead <= set(server.requests):
            assert time.monotonic() < deadline, server.requests
            time.sleep(0.01)
        read += [batch.tokens.tolist() for batch in batches]
    assert read == [b[-1] for b in batches_of(local, shape, last_step=steps)]


def test_a_fetch_ahead_that_fails_is_tried_again_when_it_is_needed(
    tmp_path, write_set, monkeypatch, capfd
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    local, _ = write_set(tmp_path, *[2050] * 40)
    shape = BatchShape(100, 8)
    order = RowOrder(local, 100, 5)
    order.rows(0, 1)
    name = local.shards[order.shards_ahead()[-1]].name
    access = dataclasses.replace(ACCESS, attempts=2)
    with FaultyServer(tmp_path) as server:
        remote = Manifest.load(server.url, access)
        server.fail(name, 500, times=2)
        steps = local.rows(100) // 8
        batches = training_batches(
            remote,
            shape,
            seed=5,
            last_step=steps,
            num_workers=0,
        )
        read = [next(batches).tokens.tolist()]
        deadline = time.monotonic() + 30
        while server.gets(name) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        read += [batch.tokens.tolist() for batch in batches]
    assert read == [b[-1] for b in batches_of(local, shape, last_step=steps)]
    assert f"{name}: HTTP status 500" in capfd.readouterr().err


def test_evaluation_and_token_counts_are_those_of_the_folder(token_set, server):
    local = token_set[0]
    remote = Manifest.load(server.url, ACCESS)
    read = [
        [
            batch.tokens.tolist()
            for batch in evaluation_batches(manifest, BatchShape(1000, 4))
        ]
        for manifest in (remote, local)
    ]
    assert read[0] == read[1]
    assert server.gets(".tar") == len(SIZES), "each shard is fetched once"
    np.testing.assert_array_equal(token_counts(remote), token_counts(local))


def test_the_held_out_set_beside_is_found(token_set, server, capfd):
    val = held_out_set(Manifest.load(server.url, ACCESS).directory)
    assert str(val) == f"{server.url}/val"
    assert Manifest.load(val).tokens == 3000
    assert held_out_set(val) is None
    # What S3 says of an absent file to who may not list.
    server.fail("val/manifest.json", 403, method="HEAD")
    server.fail("val/manifest.json", 403)
    assert held_out_set(Manifest.load(server.url, ACCESS).directory) is None
    assert "val/manifest.json: the server denies access" in capfd.readouterr().err


def test_any_file_system_of_fsspec_will_do(token_set):
    local = token_set[0]
    remote = Manifest.load(f"file://{local.directory}", ACCESS)
    verify_shards(remote)
    assert batches_of(remote) == batches_of(local)


FAULTS = {
    "stall": "nothing came in time",
    "drop": "Client",
    "truncated": "bytes came, not",
    "wrong": "sha256",
    500: "HTTP status 500: Internal Server Error",
    503: "HTTP status 503",
    429: "HTTP status 429",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_that_passes_is_retried_aloud(token_set, server, capfd, fault):
    access = IMPATIENT if fault == "stall" else ACCESS
    remote, tokens = Manifest.load(server.url, access), token_set[1]
    server.fail("shard-00006.tar", fault, times=3)
    np.testing.assert_array_equal(
        TokenReader(remote).read(9000, 60000), tokens[9000:60000]
    )
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    for attempt, line in enumerate(lines, 1):
        assert line.startswith(f"ten-dist: {server.url}/shard-00006.tar: ")
        assert FAULTS[fault] in line
        assert "trying again in 0.0 s" in line or "trying again in 0.1 s" in line
        assert f"(attempt {attempt} of 4)" in line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_that_stays_ends_in_one_clear_line(server, fault):
    access = IMPATIENT if fault == "stall" else ACCESS
    access = dataclasses.replace(access, attempts=2)
    remote = Manifest.load(server.url, access)
    server.fail("shard-00000.tar", fault, times=99)
    with pytest.raises(DataError) as caught:
        TokenReader(remote).read(0, 10)
    message = str(caught.value)
    assert f"{server.url}/shard-00000.tar cannot be read" in message
    assert "given up after 2 attempts" in message and FAULTS[fault] in message
    assert "\n" not in message
    assert server.gets("shard-00000.tar") == 2


def test_a_server_that_is_not_there(monkeypatch, token_set):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(token_set[0].directory) as server:
        url = server.url
    with pytest.raises(DataError, match=r"cannot read .*given up after 2 attempts"):
        Manifest.load(url, dataclasses.replace(ACCESS, attempts=2))


@pytest.mark.parametrize(("status", "said"), [(404, "is missing"), (403, "denies")])
def test_what_will_not_change_is_not_retried(server, capfd, status, said):
    remote = Manifest.load(server.url, ACCESS)
    server.fail("shard-00000.tar", status)
    with pytest.raises(DataError, match=rf"{server.url}/shard-00000\.tar.*{said}"):
        TokenReader(remote).read(0, 10)
    assert server.gets("shard-00000.tar") == 1
    server.fail("/manifest.json", status)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.load(server.url, ACCESS)
    assert server.gets("/manifest.json") == 2
    assert capfd.readouterr().err == ""


def test_the_check_before_a_run_sees_every_size(token_set, server, tmp_path):
    shutil.copytree(token_set[0].directory, tmp_path, dirs_exist_ok=True)
    server.folder = tmp_path
    remote = Manifest.load(server.url, ACCESS)
    # Servers are asked again as for shards, and no shard is fetched.
    server.fail("shard-00004.tar", 500, method="HEAD")
    server.fail("shard-00004.tar", 500)
    verify_shards(remote)
    assert server.gets(".tar") == 1
    cut = tmp_path / "shard-00005.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    verify_shards(remote, 0, 2)
    with pytest.raises(DataError, match=rf"{server.url}/shard-00005\.tar is truncated"):
        verify_shards(remote, 1, 2)
    cut.unlink()
    with pytest.raises(DataError, match=r"shard-00005\.tar is missing"):
        verify_shards(remote, full=False)


def test_the_tokenizer_must_be_the_one_of_the_shards(server):
    remote = Manifest.load(server.url, ACCESS)
    server.fail("tokenizer.json", "wrong")
    verify_shards(remote)
    server.fail("tokenizer.json", "wrong", times=99)
    with pytest.raises(DataError, match=r"cannot read tokenizer .*sha256"):
        verify_shards(remote)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:secret@host/data", "a user, a query or a fragment"),
        ("https://host/data?signature=secret", "a user, a query or a fragment"),
        ("http://[host/data", "not a valid URL"),
        ("nothing://host/data", "nothing://host/data cannot be opened"),
        ("simplecache::http://host/data", "a chain of URLs"),
        ("zip://data.zip::http://host/data", "a chain of URLs"),
        ("http://[::1]:1/data", "cannot read http://[::1]:1/data/manifest.json"),
    ],
)
def test_urls_that_cannot_be_used(url, said):
    with pytest.raises(DataError) as caught:
        Manifest.load(url, dataclasses.replace(ACCESS, attempts=1))
    assert said in str(caught.value) and "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


WITHOUT_EXTRAS = """
import sys
for name in ("aiohttp", "s3fs", "tenacity"):
    sys.modules[name] = None
from ten_dist.data import Manifest, TokenReader, verify_shards
from ten_dist.errors import DataError
manifest = Manifest.load(sys.argv[1])
verify_shards(manifest)
TokenReader(manifest).read(0, 10)
for url in ("http://127.0.0.1/data", "s3://bucket/data"):
    try:
        Manifest.load(url)
    except DataError as error:
        assert url in str(error) and "\\n" not in str(error)
        print(error)
"""


def test_without_the_extra_packages_only_urls_are_refused(token_set):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, str(token_set[0].directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'ten_dist[remote]'" in line for line in lines)


def test_the_data_command_looks_at_a_url(token_data, server, capsys):
    server.folder = token_data
    described = []
    for data in (server.url, str(token_data)):
        assert main(["data", "verify", data]) == 0
        assert main(["data", "inspect", data, "--json"]) == 0
        output = capsys.readouterr().out
        described.append(output[output.index("\n[") :].replace(data, "DATA"))
    assert described[0] == described[1]
    server.fail("shard-00001.tar", 404)
    assert main(["data", "verify", server.url]) == 2
    assert f"{server.url}/shard-00001.tar is missing" in capsys.readouterr().err

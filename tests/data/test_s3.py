"""Token sets in a bucket of an S3 server."""

from __future__ import annotations

import numpy as np
import pytest

from ten_dist.data import (
    BatchShape,
    Manifest,
    RemoteAccess,
    ShardCache,
    TokenReader,
    held_out_set,
    training_batches,
    verify_shards,
)
from ten_dist.errors import DataError
from tests.tools.serving import FaultyServer

pytest.importorskip("s3fs", reason="s3fs of the extra `remote` is not installed")
moto_server = pytest.importorskip(
    "moto.server", reason="moto[server] of the extra `dev` is not installed"
)
BUCKET = "tokens"
SIZES = (900, 1500, 2000, 71000, 700)


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def standard_environment(endpoint, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def bucket(endpoint, standard_environment):
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def token_set(tmp_path, write_set, bucket):
    """(manifest, tokens) on disk, and a copy at s3://tokens/some/set."""
    folder = tmp_path / "set"
    write_set(folder / "val", 3000)
    manifest, tokens = write_set(folder, *SIZES)
    for path in folder.rglob("*.*"):
        bucket.upload_file(
            str(path), BUCKET, f"some/set/{path.relative_to(folder).as_posix()}"
        )
    return manifest, tokens


URL = f"s3://{BUCKET}/some/set"
ACCESS = RemoteAccess(timeout_seconds=10, attempts=3, first_wait_seconds=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(token_set, workers):
    local, remote = token_set[0], Manifest.load(URL + "/", ACCESS)
    assert str(remote.shard_path(1)) == f"{URL}/shard-00001.tar"
    verify_shards(remote)
    shape, options = BatchShape(500, 4, 0, 2), {"seed": 3, "last_step": 12}
    read = [
        [batch.tokens.tolist() for batch in training_batches(data, shape, **options)]
        for data in (remote, local)
    ]
    assert read[0] == read[1]
    forked = training_batches(remote, shape, **options, num_workers=workers)
    assert [batch.tokens.tolist() for batch in forked] == read[1]


def test_the_held_out_set_beside_is_found(token_set):
    val = held_out_set(Manifest.load(URL, ACCESS).directory)
    assert Manifest.load(val).tokens == 3000
    assert held_out_set(val) is None


def test_cached_shards_outlive_the_bucket(token_set, bucket, tmp_path):
    access = RemoteAccess(ShardCache(tmp_path / "cache"))
    remote, tokens = Manifest.load(URL, access), token_set[1]
    np.testing.assert_array_equal(TokenReader(remote).read(0, remote.tokens), tokens)
    for shard in remote.shards:
        bucket.delete_object(Bucket=BUCKET, Key=f"some/set/{shard.name}")
    np.testing.assert_array_equal(TokenReader(remote).read(0, remote.tokens), tokens)


def test_what_is_wrong_in_the_bucket_is_one_clear_line(token_set, bucket, capfd):
    remote = Manifest.load(URL, ACCESS)
    key = "some/set/shard-00002.tar"
    good = bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    bucket.put_object(Bucket=BUCKET, Key=key, Body=good[:-1] + b"x")
    verify_shards(remote)
    with pytest.raises(DataError, match=rf"{URL}/shard-00002\.tar.*3 attempts.*sha256"):
        TokenReader(remote).read(3000, 3010)
    assert capfd.readouterr().err.count("trying again") == 2
    bucket.put_object(Bucket=BUCKET, Key=key, Body=good[:-512])
    with pytest.raises(DataError, match=rf"{URL}/shard-00002\.tar is truncated"):
        verify_shards(remote)
    bucket.delete_object(Bucket=BUCKET, Key=key)
    for read in (
        verify_shards,
        lambda manifest: TokenReader(manifest).read(3000, 3010),
    ):
        with pytest.raises(DataError, match=rf"{URL}/shard-00002\.tar is missing"):
            read(remote)
    for url in (f"s3://{BUCKET}/other", "s3://no-such-bucket/set"):
        with pytest.raises(DataError, match=rf"{url} has no manifest\.json"):
            Manifest.load(url, ACCESS)
    assert capfd.readouterr().err == ""


FAULTS = {
    "stall": "imeout",
    "drop": "",
    "truncated": "bytes came, not",
    "wrong": "sha256",
    500: "HTTP status 500",
    503: "HTTP status 503",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_that_passes_is_retried_aloud(
    tmp_path, write_set, monkeypatch, capfd, fault
):
    """By the client of S3 too, here of a server that knows no more than files."""
    _, tokens = write_set(tmp_path / BUCKET / "some" / "set", *SIZES)
    with FaultyServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        # Another timeout makes another client, which looks for the endpoint anew.
        timeout = 1 + server.port / 1e6
        access = RemoteAccess(None, timeout, attempts=4, first_wait_seconds=0.01)
        remote = Manifest.load(URL, access)
        server.fail("shard-00003.tar", fault, times=2)
        server.fail("shard-00001.tar", fault, times=2, method="HEAD")
        read = TokenReader(remote).read(0, remote.tokens)
        np.testing.assert_array_equal(read, tokens)
        assert server.gets("shard-00003.tar") == 3
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2 and all(FAULTS[fault] in line for line in lines)
        assert all(f"{URL}/shard-00003.tar" in line for line in lines)
        if isinstance(fault, int):
            verify_shards(remote)
            assert "shard-00001.tar: HTTP status" in capfd.readouterr().err


def test_missing_credentials_are_not_retried(token_set, monkeypatch, capfd, tmp_path):
    Manifest.load(URL, ACCESS)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError) as caught:
        # Another timeout makes another client, which looks for credentials anew.
        Manifest.load(URL, RemoteAccess(timeout_seconds=9))
    assert "give credentials in the environment" in str(caught.value)
    assert capfd.readouterr().err == ""

"""Training on data behind a URL: as on the same data in a folder."""

import json

import pytest

from ten_dist.cli import main
from tests.engine.test_refusals import refusal
from tests.tools.launching import SMALL_MODEL, step_metrics, train
from tests.tools.serving import FaultyServer

pytest.importorskip("aiohttp", reason="aiohttp of the extra `remote` is not installed")


@pytest.fixture
def server(token_data, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(token_data) as server:
        yield server


def options_of(data, output_dir, **changes):
    values = {
        "data": data,
        "output_dir": output_dir,
        "steps": 4,
        "global_batch_size": 4,
        "seq_len": 64,
        "precision": "fp32",
        "num_workers": 1,
        "eval_interval": 2,
        "eval_rows": 8,
    }
    return {name: str(value) for name, value in {**values, **changes}.items()}


def arguments_of(options):
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def local_run(token_data, tmp_path_factory):
    """Folder of a run on the data's folder."""
    folder = tmp_path_factory.mktemp("local") / "run"
    arguments = arguments_of(options_of(token_data, folder))
    assert main(["train", *SMALL_MODEL, *arguments]) == 0
    return folder


@pytest.mark.slow
def test_a_run_is_the_same_from_a_url(local_run, server, tmp_path, capsys):
    cache = {"data_cache": tmp_path / "cache", "data_cache_gigabytes": 0.5}
    runs = {"streamed": {}, "cached": cache}
    for name, changes in runs.items():
        server.fail("shard-00000.tar", 500)
        arguments = arguments_of(options_of(server.url, tmp_path / name, **changes))
        assert main(["train", *SMALL_MODEL, *arguments]) == 0
        output = capsys.readouterr().out
        assert f"validation: {server.url}/val, " in output
        assert (f"{tmp_path / 'cache'}, 0.5 GB at most" in output) == bool(changes)
        for metric in ("loss", "val_loss"):
            expected = step_metrics(local_run, metric)
            assert expected and step_metrics(tmp_path / name, metric) == expected
    assert list((tmp_path / "cache").glob("*.tar"))
    tokenizer = (local_run / "tokenizer.json").read_bytes()
    assert (tmp_path / "cached" / "tokenizer.json").read_bytes() == tokenizer

    # A run may be continued from the other place, and its data is found again by name.
    for data in (server.url, server.folder):
        arguments = arguments_of(options_of(data, local_run))
        assert main(["train", *SMALL_MODEL, *arguments]) == 0
        assert "is complete" in capsys.readouterr().out
    figures = []
    for run in (local_run, tmp_path / "streamed"):
        assert main(["evaluate", str(run), "--unigram_baseline", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
        del figures[-1]["checkpoint"]
    assert figures[0] == figures[1]
    command = ["evaluate", str(local_run), "--data", f"{server.url}/val"]
    command += ["--data_cache", str(tmp_path / "other")]
    for fetches in (True, False):
        before = server.gets(".tar")
        assert main(command) == 0
        assert f"data: {server.url}/val, " in capsys.readouterr().out
        assert (server.gets(".tar") > before) == fetches
    assert main(["evaluate", str(local_run), *command[-2:]]) == 2
    assert "--data_cache has no effect with local --data" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_share_the_cache(local_run, server, tmp_path):
    cache = tmp_path / "cache"
    options = options_of(server.url, tmp_path / "run", data_cache=cache)
    train([*SMALL_MODEL, *arguments_of(options)], ranks=2)
    losses = step_metrics(tmp_path / "run")
    assert losses == pytest.approx(step_metrics(local_run), rel=1e-5)
    gets = [path for method, path in server.requests if method == "GET"]
    shards = [path for path in gets if path.endswith(".tar")]
    assert shards and len(shards) == len(set(shards)), "each is fetched once"


@pytest.mark.slow
def test_data_that_is_replaced_while_ranks_look_is_refused(server, tmp_path):
    """One of the two ranks sees the set as it was before."""
    server.fail("/manifest.json", server.folder / "val" / "manifest.json")
    arguments = arguments_of(options_of(server.url, tmp_path / "run"))
    output = train([*SMALL_MODEL, *arguments], ranks=2, expect=2)
    errors = [line for line in output.splitlines() if line.startswith("ten-dist:")]
    assert len(errors) == 1 and "not the same token set as on rank 0" in errors[0]
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_is_refused(capsys, token_data, server, tmp_path):
    def refused(data=server.url, **changes):
        options = options_of(data, tmp_path / "run", **changes)
        line = refusal(capsys, options)
        assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
        return line

    cache = tmp_path / "cache"
    assert "--data_cache has no effect with local --data" in refused(
        data=token_data, data_cache=cache
    )
    assert "--data_cache_gigabytes has no effect without" in refused(
        data_cache_gigabytes=1
    )
    assert "--data_cache_gigabytes must be more than 0" in refused(
        data_cache=cache, data_cache_gigabytes=0
    )
    assert "does not hold the largest shard" in refused(
        data_cache=cache, data_cache_gigabytes=1e-6
    )
    (tmp_path / "file").write_text("")
    assert "file/cache cannot be made" in refused(data_cache=tmp_path / "file/cache")
    assert f"{server.url}/none has no manifest.json" in refused(
        data=f"{server.url}/none"
    )
    server.fail("shard-00001.tar", 404, method="HEAD")
    server.fail("shard-00001.tar", 404)
    assert f"{server.url}/shard-00001.tar is missing" in refused(data_cache=cache)


def test_a_dry_run_leaves_no_cache(server, tmp_path, capsys):
    options = options_of(
        server.url, tmp_path / "run", data_cache=tmp_path / "cache", num_workers=0
    )
    assert main(["train", *SMALL_MODEL, *arguments_of(options), "--dry_run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_goes_ends_the_run_with_what_to_do(server, tmp_path, capsys):
    arguments = arguments_of(options_of(server.url, tmp_path / "run", num_workers=0))
    server.fail(".tar", 404, times=999)
    assert main(["train", *SMALL_MODEL, *arguments]) == 1
    error = capsys.readouterr().err
    assert "is missing: see that the server" in error
    assert "then start again to continue" in error

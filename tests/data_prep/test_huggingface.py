"""Hugging Face data sets by name: their documents, or one line that says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ten_dist.data import Manifest
from tests.conftest import contents
from tests.tools.hub import COMMIT, Hub

pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
ROOT = Path(__file__).resolve().parents[2]
BYTES = ("--tokenizer", "bytes", "--shard_megabytes", "0.005")
CARD = """---
configs:
- config_name: english
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: german
  data_files: de/*.jsonl
- config_name: array
  data_files: array.json
- config_name: table
  data_files: table.csv
---
"""


@pytest.fixture(scope="module")
def texts(sentence):
    return {
        name: [f"{name} {n}: {sentence(n, 30)}" for n in range(count)]
        for name, count in (("train", 90), ("test", 20), ("german", 30))
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, texts):
    """A folder as it would be on the Hub, of three configurations."""
    folder = tmp_path_factory.mktemp("datasets") / "tales"
    (folder / "data").mkdir(parents=True)
    (folder / "de").mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "array.json").write_text('[\n{"text": "one"}\n]')
    (folder / "table.csv").write_text("text\nhello\n")
    for part in range(3):
        table = pyarrow.table({"text": texts["train"][part::3], "n": list(range(30))})
        path = folder / "data" / f"train-0000{part}-of-00003.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    table = pyarrow.table({"text": texts["test"]})
    pyarrow.parquet.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    lines = [json.dumps({"text": text}) + "\n" for text in texts["german"]]
    (folder / "de" / "all.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    "config, split, expected",
    [("english", [], "train"), ("english", ["test"], "test"), ("german", [], "german")],
)
def test_documents_of_a_folder(
    tmp_path, dataset, prepare, decoded, texts, config, split, expected
):
    arguments = ["--dataset", f"{dataset}:{config}", "--output", tmp_path / "out"]
    arguments += ["--dataset_split", *split] if split else []
    status, _, errors = prepare(*arguments, *BYTES)
    assert status == 0, errors
    assert sorted(decoded(tmp_path / "out")) == sorted(texts[expected])
    source = Manifest.load(tmp_path / "out").source["dataset"]
    assert source == {"config": config, "split": (split or ["train"])[0]}


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("{dataset}", [], "pick one among the available configs: ['english', "),
        ("{dataset}:french", [], "'french' not found. Available: ['english', "),
        (
            "{dataset}:english",
            ["--dataset_split", "all"],
            "no split 'all': give one of test train with --dataset_split",
        ),
        ("{dataset}:table", [], "table.csv is neither Parquet nor JSON Lines"),
        (
            "{dataset}:english",
            ["--text_field", "body"],
            "no column 'body', it has text",
        ),
        ("{dataset}:german", ["--text_field", "body"], "all.jsonl:1: no field 'body'"),
        (
            "{dataset}:array",
            [],
            "no text was found in --dataset {dataset}:array: 1 JSON files that are not",
        ),
        ("{dataset}/none", [], "Couldn't find any data file at "),
        ("{dataset}:english", ["--include", "*"], "--include and --exclude have no"),
        ("{dataset}:english", ["--corpus", "python-stdlib"], "cannot both be given"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, dataset, prepare, name, options, expected):
    name = name.replace("{dataset}", str(dataset))
    arguments = ["--dataset", name, "--output", tmp_path / "out", *BYTES, *options]
    status, _, errors = prepare(*arguments)
    assert status == 2
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in errors
    assert expected.replace("{dataset}", str(dataset)) in lines[0]
    assert not (tmp_path / "out").exists()


def test_without_the_extra(tmp_path, dataset, prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = ["--dataset", f"{dataset}:english", "--output", tmp_path / "out"]
    status, _, errors = prepare(*arguments, *BYTES)
    assert status == 2 and "pip install 'ten_dist[huggingface]'" in errors


def run(folder, *arguments, before=(sys.executable,), **environment):
    """The command in a process of its own: the libraries read their environment once."""
    return subprocess.run(
        [*before, "-m", "mpi4py", "-m", "data_prep.shard", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "hf"),
            "no_proxy": "127.0.0.1",
            **environment,
        },
        check=False,
    )


@pytest.mark.slow
def test_a_data_set_of_the_hub(tmp_path, dataset, prepare, mpiexec_command):
    """Fetched once, and the same on any number of ranks as from the folder."""
    folder = tmp_path / "folder"
    config = ["--dataset", f"{dataset}:english", "--output", folder, *BYTES]
    assert prepare(*config)[0] == 0
    arguments = ["--dataset", "someone/tales:english", *BYTES]
    with Hub(dataset, "someone/tales") as hub:
        outputs = []
        for ranks in (1, 2):
            output = tmp_path / f"out{ranks}"
            done = run(
                tmp_path,
                *(*arguments, "--output", str(output)),
                before=mpiexec_command(ranks),
                HF_ENDPOINT=hub.url,
            )
            assert done.returncode == 0, done.stderr
            outputs.append(contents(output))
        parts = [name for name in hub.fetched if name.endswith(".parquet")]
        assert len(parts) == 3 and all("train" in name for name in parts)
        # Gone from the Hub, or misspelt.
        missing = ["--dataset", "someone/tails", "--output", str(tmp_path / "x")]
        done = run(tmp_path, *missing, *BYTES, HF_ENDPOINT=hub.url)
    assert done.returncode == 2 and "someone/tails" in done.stderr
    assert not (tmp_path / "x").exists()
    assert outputs[0] == outputs[1]
    shards = {name for name in outputs[0] if name.endswith(".tar")}
    assert len(shards) > 1
    assert all(outputs[0][name] == contents(folder)[name] for name in shards)
    source = Manifest.load(output).source["dataset"]
    assert source["name"] == "someone/tales" and source["commit"] == COMMIT


def test_without_a_network(tmp_path):
    arguments = ["--dataset", "someone/tales", "--output", str(tmp_path / "out")]
    done = run(tmp_path, *arguments, *BYTES, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "error: --dataset someone/tales: Couldn't reach 'someone/tales'" in done.stderr
    )
    assert not (tmp_path / "out").exists()

"""`--tracker`: one curve at the tracker whatever happens to the run, and no harm from it.

The packages are in no extra of the tests; where one is not installed its test is passed
over. Stand-ins that fail and hang are always tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from ten_dist.cli import main
from ten_dist.monitor.run_monitor import RunMonitor
from ten_dist.monitor.trackers.tracker_process import TrackerProcess
from ten_dist.run_folder import RunFolder
from tests.tools.launching import ROOT, SMALL_MODEL, step_metrics, train_here

# A start of a run that is killed when the tracker has five steps of it.
KILLED_START = """
import json, os, pathlib, signal, sys, time
from ten_dist.monitor.trackers.tracker_process import TrackerProcess
name, run = sys.argv[1], pathlib.Path(sys.argv[2])
tracker = TrackerProcess(name, "project", run)
for step in range(1, 6):
    tracker.write(step, {"train/loss": 10.0 - step})
kept = run / "trackers" / f"{name}.json"
while not kept.exists() or json.loads(kept.read_text())["steps"]["train/loss"] < 5:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


LIMIT = "ten_dist.monitor.trackers.tracker_process._SECONDS_AT_THE_END"


@pytest.fixture(scope="module")
def record(token_data, tmp_path_factory):
    """What a run's config.json says."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    options = [*SMALL_MODEL, "--data", token_data, "--steps", 1, "--seq_len", 32]
    train_here([*options, "--num_workers", 0, "--output_dir", folder])
    return (folder / "config.json").read_text()


@pytest.fixture
def run(record, tmp_path):
    """Folder of a run before its first step."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(record)
    return folder


def report(run, name, first_step, steps, rewind=None):
    """One start of a run, that may go back to a step and do the rest again."""
    tracker = TrackerProcess(name, "project", run)
    monitor = RunMonitor(RunFolder(run), first_step, 100, tracker=tracker)
    for step in range(first_step + 1, steps + 1):
        monitor.step(figures(step))
    if rewind is not None:
        monitor.rewind(rewind)
        for step in range(rewind + 1, steps + 2):
            monitor.step(figures(step))
        monitor.record({"step": rewind, "val_loss": 3.0} | PERPLEXITY)
    monitor.close()


PERPLEXITY = {"val_perplexity": 20.0, "val_bits_per_byte": 1.0}


def figures(step):
    names = ("ce_loss", "energy_loss", "learning_rate", "tokens_per_second")
    return {"step": step, "loss": 10.0 - step, **dict.fromkeys(names, 1.0)}


def tracked_after_a_kill_and_a_rollback(name, run):
    command = [sys.executable, "-c", KILLED_START, name, str(run)]
    subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    time.sleep(1)  # for the tracker to take what the killed process has said
    report(run, name, first_step=3, steps=7, rewind=6)
    log = (run / "trackers" / f"{name}.log").read_text()
    return json.loads((run / "trackers" / f"{name}.json").read_text())["id"], log


def needs(package):
    missing = importlib.util.find_spec(package) is None
    reason = f"{package} is not installed: pip install 'ten_dist[{package}]'"
    return pytest.mark.skipif(missing, reason=reason)


EACH_ONCE = [(step, 10.0 - step) for step in range(1, 9)]


@needs("wandb")
def test_wandb(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    identity, log = tracked_after_a_kill_and_a_rollback("wandb", run)
    # One folder for each start; `wandb sync` joins those of one id in their order.
    files = sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2, log
    rows = [row for file in files for row in wandb_history(file)]
    losses = [(r["_step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert losses == EACH_ONCE
    # Told late, it stands where the curve is by then.
    assert [r["_step"] for r in rows if r.get("validation/loss") == 3.0] == [8]


def wandb_history(path):
    """Rows of history in a file of wandb: records of protobuf in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found = Record.FromString(record)
            record = b""
            if found.HasField("history"):
                items = found.history.item
                yield {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json)
                    for i in items
                } | {"_step": found.history.step.num}


@needs("mlflow")
def test_mlflow(run, monkeypatch, tmp_path):
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    identity, log = tracked_after_a_kill_and_a_rollback("mlflow", run)
    from mlflow import MlflowClient

    client = MlflowClient(address)
    points = client.get_metric_history(identity, "train/loss")
    assert sorted((p.step, p.value) for p in points) == EACH_ONCE, log
    (experiment,) = client.search_experiments(filter_string="name = 'project'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name) == (identity, "run")
    assert (found.info.status, found.data.params["dim"]) == ("FINISHED", "32")
    assert [p.step for p in client.get_metric_history(identity, "validation/loss")] == [
        6
    ]


@needs("trackio")
def test_trackio(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    identity, log = tracked_after_a_kill_and_a_rollback("trackio", run)
    # Where its files lie it decides when it is imported.
    program = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_runs('project'), S.get_logs('project', sys.argv[1])]))"
    )
    command = [sys.executable, "-c", program, identity]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runs, rows = json.loads(printed.splitlines()[-1])
    assert runs == [identity], log
    losses = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert sorted(losses) == EACH_ONCE


def stand_in(folder, monkeypatch, init):
    """A package wandb whose runs begin with the given body."""
    folder.mkdir()
    (folder / "wandb.py").write_text(
        f"import time\nSettings = dict\ndef init(**options):\n    {init}\n"
    )
    monkeypatch.syspath_prepend(folder)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


def test_a_tracker_that_fails_is_one_line(token_data, tmp_path, monkeypatch, capfd):
    stand_in(tmp_path / "packages", monkeypatch, "raise ValueError('no such key')")
    options = [*SMALL_MODEL, "--data", token_data, "--steps", 3, "--precision", "fp32"]
    options += ["--global_batch_size", 4, "--seq_len", 32, "--num_workers", 0]
    options += ["--eval_rows", 4, "--output_dir", tmp_path / "run"]
    train_here([*options, "--tracker", "wandb"])
    lines = [
        line for line in capfd.readouterr().err.splitlines() if "--tracker" in line
    ]
    assert len(lines) == 1
    assert "training goes on without it: ValueError: no such key" in lines[0]
    assert (tmp_path / "run" / "COMPLETED").is_file()
    assert sorted(step_metrics(tmp_path / "run")) == [1, 2, 3]


def test_a_tracker_that_hangs_holds_nothing_up(run, tmp_path, monkeypatch, capsys):
    stand_in(tmp_path / "packages", monkeypatch, "time.sleep(600)")
    monkeypatch.setattr(LIMIT, 0.5)
    tracker = TrackerProcess("wandb", "project", run)
    (process,) = (
        child
        for child in psutil.Process().children()
        if "ten_dist.monitor.trackers.sender" in child.cmdline()
    )
    slowest = 0.0
    for step in range(1, 10_000):
        began = time.perf_counter()
        tracker.write(step, {"train/loss": 1.0})
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 0.5
    began = time.perf_counter()
    tracker.close()
    assert time.perf_counter() - began < 5
    assert not process.is_running()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "is slower than the run" in lines[0]
    assert "did not end within 0.5 s after the run" in lines[1]


def test_what_cannot_be_tracked_is_refused(token_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["train", *SMALL_MODEL, "--data", token_data, "--steps", 2]
    arguments += ["--output_dir", tmp_path / "run"]
    for more, words in (
        (["--tracker", "mlflow"], "pip install 'ten_dist[mlflow]'"),
        (["--tracker", "neptune"], "--tracker must be one of wandb, mlflow, trackio"),
        (["--tracker_project", "mine"], "no effect without --tracker"),
    ):
        assert main([*map(str, arguments), *more]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

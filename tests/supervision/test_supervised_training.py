"""Supervised trainings end as if nothing had happened to them."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.tools.launching import (
    ROOT,
    SMALL_MODEL,
    checkpoint_of,
    launch_environment,
    read_ledger,
    read_metrics,
    step_metrics,
    train,
    train_command,
)

STEPS = 10
OPTIONS = [
    *SMALL_MODEL,
    *("--dropout", 0.1, "--precision", "fp32", "--steps", STEPS),
    *("--global_batch_size", 8, "--seq_len", 64, "--checkpoint_interval", 4),
    "--ledger",
]


@pytest.fixture(scope="module")
def whole_run(token_data, tmp_path_factory):
    """The folder of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train([*OPTIONS, "--data", token_data, "--output_dir", folder])
    return folder


def supervisor_command(arguments, ranks, *options, deepspeed=True):
    """Command that supervises a training with a fault, by default through DeepSpeed's
    launcher, whose statuses and leftovers a supervisor has to judge."""
    script = "tests/tools/faulty_train.py"
    job = train_command(arguments, ranks, script, deepspeed=deepspeed)
    supervisor = [sys.executable, "-m", "launch.supervise", "--backoff", "0"]
    return [*supervisor, *options, "--", *job]


def supervise(arguments, fault, ranks, expect, *, deepspeed=True, **variables):
    """Supervise a training with a fault to its end; returns what was printed."""
    result = subprocess.run(
        supervisor_command(arguments, ranks, deepspeed=deepspeed),
        cwd=ROOT,
        env={**launch_environment(), "FAULT": fault, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == expect, output[-6000:]
    return output


def events(folder, name):
    lines = (folder / "supervisor.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status"),
    # The launcher's: -9 in a byte, no failure at all where it was killed itself, and
    # that of the watchdog.
    [("die:1:7", 247), ("orphan:1:7", 0), ("sleep:0:7", 4)],
)
def test_a_disturbed_run_ends_as_an_undisturbed_one(
    fault, status, whole_run, token_data, tmp_path
):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    if fault.startswith("sleep"):
        # Long enough for a machine that has other things to do as well.
        arguments += ["--hang_timeout", 15]
    saved = checkpoint_of(folder, 4)
    variables = {"FAULT_MARK": str(tmp_path / "mark"), "FAULT_AFTER": str(saved)}
    # That DeepSpeed's launcher passes the status of the watchdog on is in test_hang.py.
    deepspeed = not fault.startswith("sleep")
    output = supervise(arguments, fault, 2, 0, deepspeed=deepspeed, **variables)
    assert "from step_00000004, 4 steps done" in output
    first, second = events(folder, "end")
    assert first["status"] == status
    assert (len(first["left_behind"]) >= 2) == fault.startswith("orphan")
    assert (first["completed"], first["failed_step"]) == (False, 7)
    assert second["completed"]
    if fault.startswith("sleep"):
        assert (
            "rank 0 of 2" in first["hang"][0] and "data of step 7" in first["hang"][0]
        )
    assert step_metrics(folder) == step_metrics(whole_run)
    assert read_ledger(folder) == read_ledger(whole_run)


@pytest.mark.slow
def test_a_step_that_always_fails_ends_it(token_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    output = supervise(arguments, "fail:0:6", 0, 1)
    assert [end["failed_step"] for end in events(folder, "end")] == [6, 6, 6]
    report = output[output.index("giving up") :]
    assert "step 6 has failed 3 times" in report
    assert "RuntimeError: a fault that comes back" in report


@pytest.mark.slow
def test_a_wrong_option_is_not_retried(token_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    arguments += ["--global_batch_size", 0]
    output = supervise(arguments, "fail:0:1", 0, 2)
    assert "--global_batch_size must be 1 or more" in output
    assert output.count("ten-dist supervise: start ") == 1
    assert not folder.exists()


@pytest.mark.slow
def test_a_signal_ends_supervisor_and_ranks(token_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    arguments += ["--steps", 100000]
    process = subprocess.Popen(
        supervisor_command(arguments, 2, "--grace", "30"),
        cwd=ROOT,
        env=launch_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(m["step"] >= 5 for m in read_metrics(folder)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 3
    left = [
        found.pid
        for found in psutil.process_iter(["cmdline"])
        if found.pid != os.getpid() and str(folder) in (found.info["cmdline"] or [])
    ]
    assert not left
    assert len(events(folder, "start")) == 1
    assert [e["action"] for e in events(folder, "decision")] == ["stopped"]

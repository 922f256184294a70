"""A run in which one rank is stuck ends, and says which and in what."""

import os
import subprocess

import psutil
import pytest

from ten_dist.errors import EXIT_HANG
from ten_dist.monitor.hang_reports import read_reports
from tests.launching import (
    ROOT,
    SMALL_MODEL,
    launch_environment,
    read_metrics,
    train_command,
)

OPTIONS = [
    *SMALL_MODEL,
    *("--precision", "fp32", "--global_batch_size", 8, "--seq_len", 64),
]


def train_with_fault(fault, arguments, expect, timeout=240):
    """Train on two ranks, one of them with a fault; returns what was printed."""
    result = subprocess.run(
        train_command(arguments, 2, "tests/faulty_train.py"),
        cwd=ROOT,
        env={**launch_environment(), "FAULT": fault},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == expect, output[-6000:]
    return output


def processes_of(folder):
    """Processes that have a run's folder on their command line, this one aside."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(folder) in (
            process.info["cmdline"] or []
        ):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "phase"), [("sleep", "data"), ("hold", "forward")])
def test_every_rank_reports_and_the_stuck_one_is_named(
    kind, phase, token_data, tmp_path
):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    arguments += ["--steps", 200, "--hang_timeout", 10]
    output = train_with_fault(f"{kind}:1:7", arguments, EXIT_HANG)
    stuck, waiting = read_reports(folder / "hang")
    assert (stuck.rank, stuck.phase, stuck.step) == (1, phase, 7)
    assert (waiting.rank, waiting.phase, waiting.step) == (0, "backward", 7)
    assert "in strike" in stuck.stacks
    assert "all_reduce" in waiting.stacks
    assert f"furthest behind is rank 1 of 2 on {stuck.host}" in output
    assert not processes_of(folder)
    assert not (folder / "COMPLETED").exists()


@pytest.mark.slow
def test_a_slow_rank_is_named(token_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    arguments += ["--steps", 8, "--straggler_interval", 4]
    output = train_with_fault("slow:1:1", arguments, 0)
    slowest = {m["step"]: m for m in read_metrics(folder) if "slowest_rank" in m}
    assert sorted(slowest) == [4, 8]
    for metrics in slowest.values():
        assert metrics["slowest_rank"] == 1
        assert metrics["slowest_rank_seconds"] > 0.1
        assert metrics["median_rank_seconds"] < metrics["slowest_rank_seconds"]
    assert "step 8: rank 1 is slow: 0.1" in output
    assert not (folder / "hang").exists()

"""A run in which one rank is stuck ends, and says which and in what."""

import os

import psutil
import pytest

from ten_dist.errors import EXIT_HANG
from ten_dist.monitor.hang_reports import read_reports
from tests.tools.launching import SMALL_MODEL, read_metrics, train

OPTIONS = [
    *SMALL_MODEL,
    *("--precision", "fp32", "--global_batch_size", 8, "--seq_len", 64),
]


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
    # DeepSpeed's launcher, which has to pass the status on and leave no rank behind.
    fault = f"{kind}:1:7"
    output = train(arguments, expect=EXIT_HANG, fault=fault, deepspeed=True)
    stuck, waiting = read_reports(folder / "hang")
    assert (stuck.rank, stuck.phase, stuck.step) == (1, phase, 7)
    assert (waiting.rank, waiting.phase, waiting.step) == (0, "backward", 7)
    assert "in strike" in stuck.stacks
    assert "all_reduce" in waiting.stacks
    assert f"furthest behind is {stuck.line}" in output
    assert not processes_of(folder)
    assert not (folder / "COMPLETED").exists()


@pytest.mark.slow
def test_a_slow_rank_is_named(token_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    arguments += ["--steps", 8, "--straggler_interval", 4]
    output = train(arguments, fault="slow:1:1")
    slowest = {m["step"]: m for m in read_metrics(folder) if "slowest_rank" in m}
    assert sorted(slowest) == [4, 8]
    for metrics in slowest.values():
        assert metrics["slowest_rank"] == 1
        assert metrics["slowest_rank_seconds"] > 0.1
        assert metrics["median_rank_seconds"] < metrics["slowest_rank_seconds"]
    assert "step 8: rank 1 is slow: 0.1" in output
    assert not (folder / "hang").exists()

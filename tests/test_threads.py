"""Threads: as many as the process may use, asleep while they wait."""

import os
import re
import subprocess
import sys

import pytest
import torch

from ten_dist import threads
from ten_dist.own_rank import OwnRank
from ten_dist.threads import compute_in_one_thread, settle_threads, usable_cores

CORES = len(os.sched_getaffinity(0))


def settings_of_openmp(command, **variables):
    """What OpenMP has read from the environment when a command had imported torch."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOCAL_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"OMP_DISPLAY_ENV": "true", **variables}
    output = subprocess.run(
        [sys.executable, "-m", "ten_dist.cli", command, "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return dict(re.findall(r"(OMP_\w+) ?= ?'(\w+)'", output))


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_openmp_is_told_before_torch_is_imported(command):
    found = settings_of_openmp(command)
    assert found["OMP_WAIT_POLICY"].lower() == "passive"
    assert int(found["OMP_NUM_THREADS"]) == usable_cores()


def test_what_the_user_has_set_holds():
    found = settings_of_openmp(
        "generate", OMP_NUM_THREADS="3", OMP_WAIT_POLICY="active"
    )
    assert found["OMP_WAIT_POLICY"].lower() == "active"
    assert int(found["OMP_NUM_THREADS"]) == 3


@pytest.fixture
def unset(monkeypatch):
    """An environment that says nothing about threads, restored after the test."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_chosen_here", False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ranks_of_a_machine_share_its_cores(unset):
    settle_threads(OwnRank(0, 2 * CORES, 0, 2 * CORES))
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_one_thread_unless_the_user_says_otherwise(unset, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settle_threads(OwnRank())
    compute_in_one_thread()
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle_threads(OwnRank())
    compute_in_one_thread()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max", CORES), ("100000", 1), ("50000", 1), ("-1", CORES), ("nonsense", CORES)],
)
def test_the_limit_of_a_container_counts(tmp_path, quota, cores):
    assert usable_cores(tmp_path) == CORES
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    assert usable_cores(tmp_path) == cores


def test_a_limit_is_said(unset, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(threads, "_cgroup_limit", lambda _: 1.5)
    settle_threads(OwnRank())
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "2 threads of 64 cores" in capsys.readouterr().err

"""A process that makes no progress says where it is, and ends with what it started."""

import datetime
import os
import subprocess
import sys
import time

import psutil
import pytest

from ten_dist.errors import EXIT_HANG
from ten_dist.monitor.hang_reports import (
    FIRST,
    ReportFile,
    read_reports,
    report_versions,
)
from ten_dist.monitor.watchdog import Watchdog
from tests.tools.launching import ROOT

BEGIN = """
import ctypes, subprocess, sys, time
from pathlib import Path
from ten_dist.monitor.watchdog import Watchdog

folder = Path(sys.argv[1])
"""


def run_script(script, folder, timeout=60):
    """Run a few lines of Python after BEGIN in a process of their own."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.slow
def test_a_stuck_process_reports_and_ends_with_its_children(tmp_path):
    result = run_script(
        """
watchdog = Watchdog(folder, 0, 1, 1.0, 60.0)
watchdog.open_report()
for step in (1, 2):
    watchdog.progress("data", step)
    watchdog.progress("forward", step)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
print("not flushed", end="")
time.sleep(600)
""",
        tmp_path,
    )
    assert result.returncode == EXIT_HANG, result.stderr
    pid, _, rest = result.stdout.partition("\n")
    assert rest == "not flushed"
    # Where nobody adopts it, what is left of a process that was killed is a zombie.
    assert not psutil.pid_exists(int(pid)) or (
        psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    )
    (report,) = read_reports(tmp_path / "hang")
    assert (report.rank, report.phase, report.step) == (0, "forward", 2)
    assert "no progress for" in report.stacks and "limit 1 s" in report.stacks
    assert 'File "<string>"' in report.stacks
    assert "no progress for" in result.stderr and "forward of step 2" in result.stderr


@pytest.mark.slow
def test_a_thread_that_keeps_the_interpreters_lock_does_not_prevent_it(tmp_path):
    result = run_script(
        """
watchdog = Watchdog(folder, 0, 1, 1.0, 60.0)
watchdog.open_report()
watchdog.progress("data", 1)
watchdog.progress("data", 2)
time.sleep(0.3)
ctypes.PyDLL(None).sleep(600)
""",
        tmp_path,
    )
    assert result.returncode == EXIT_HANG, result.stderr
    (report,) = read_reports(tmp_path / "hang")
    assert (report.phase, report.step) == ("data", 2)
    assert 'File "<string>"' in report.stacks


@pytest.mark.slow
def test_a_start_up_that_hangs_is_reported_before_there_is_a_run(tmp_path):
    result = run_script(
        """
watchdog = Watchdog(folder / "run", 3, 8, 0.0, 0.5)
time.sleep(600)
""",
        tmp_path,
    )
    assert result.returncode == EXIT_HANG, result.stderr
    (report,) = read_reports(tmp_path / "run" / "hang")
    assert (report.rank, report.phase, report.step) == (3, "start-up", None)


@pytest.mark.slow
def test_a_first_step_has_the_limit_of_the_start_up(tmp_path):
    script = """
watchdog = Watchdog(folder, 0, 1, 0.3, 60.0)
for step in range(1, int({steps}) + 1):
    watchdog.progress("forward", step)
    time.sleep(1.2)
watchdog.close()
print("ended in order")
"""
    assert run_script(script.format(steps=1), tmp_path).stdout == "ended in order\n"
    assert list(tmp_path.iterdir()) == []
    assert run_script(script.format(steps=2), tmp_path).returncode == EXIT_HANG


@pytest.mark.slow
def test_a_rank_at_work_reports_when_another_has(tmp_path):
    result = run_script(
        """
watchdog = Watchdog(folder, 1, 2, 2.0, 60.0)
watchdog.open_report()
watchdog.progress("data", 1)
(folder / "hang" / "FIRST").touch()
for _ in range(1000):
    watchdog.progress("data", 2)
    time.sleep(0.1)
""",
        tmp_path,
    )
    assert result.returncode == EXIT_HANG, result.stderr
    (report,) = read_reports(tmp_path / "hang")
    assert "when another rank reported" in report.stacks


@pytest.mark.parametrize("limits", [(0.0, 0.0), (600.0, 1800.0)])
def test_an_orderly_end_leaves_nothing(limits, tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, *limits)
    watchdog.progress("start-up")
    watchdog.open_report()
    watchdog.progress("data", 1)
    if limits[0]:
        (report,) = read_reports(tmp_path / "hang")
        assert (report.phase, report.step, report.stacks) == ("data", 1, "")
        at = datetime.datetime.fromisoformat(f"{report.since}+00:00")
        assert abs(at.timestamp() - time.time()) < 5
    watchdog.close()
    watchdog.progress("end")
    assert list(tmp_path.iterdir()) == []


def test_a_new_start_keeps_the_report_of_the_hang_before(tmp_path):
    folder = tmp_path / "hang"
    folder.mkdir()
    stacks = "\nThread 0x1 (most recent call first):\n"
    (folder / "rank0000.txt").write_text("a line" + stacks)
    (folder / FIRST).touch()
    watchdog = Watchdog(tmp_path, 0, 1, 600.0, 600.0)
    watchdog.open_report()
    watchdog.close()
    assert [path.name for path in folder.iterdir()] == ["rank0000.before.txt"]


def test_the_rank_furthest_behind_comes_first(tmp_path):
    entered = [("optimizer", 7), ("data", 8), ("data", 7), ("end", None)]
    for rank, (phase, step) in enumerate(entered):
        report = ReportFile(tmp_path, rank, 4)
        report.open()
        report.update(phase, step, 1_700_000_000.25 - rank)
    reports = read_reports(tmp_path)
    assert [report.rank for report in reports] == [2, 0, 1, 3]
    assert reports[0].since == "2023-11-14 22:13:18.250"
    # Whatever the clock says: those that were not written to since are of an earlier start.
    before = report_versions(tmp_path)
    assert read_reports(tmp_path, before) == []
    os.utime(tmp_path / "rank0002.txt", (0, 0))
    assert [report.rank for report in read_reports(tmp_path, before)] == [2]

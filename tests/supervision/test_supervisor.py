"""The supervisor with jobs of a few lines instead of trainings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ten_dist.cli import main
from ten_dist.supervision.job import find_output_dir
from tests.tools.launching import ROOT

# A job does as a training does: steps in the metrics, checkpoints, a word at the end.
BEGIN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[2])
folder.mkdir(exist_ok=True)
starts = folder / "checkpoints"
starts.mkdir(exist_ok=True)
started = len(list(starts.glob("start*"))) + 1
(starts / f"start{started}").touch()

def step(number):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": number}) + "\\n")

def save(number):
    path = folder / "checkpoints" / f"step_{number:08d}"
    path.mkdir()
    record = {"format": "ten_dist.checkpoint", "version": 2, "step": number, "files": {},
              "consumed_rows": 0, "metrics": {}, "excluded_batches": [], "health": {},
              "optimizer_steps": number, "probe_loss": 1.0, "state_identity": {},
              "precision": "fp32", "world_size": 1, "zero_stage": 0, "held_seconds": 0,
              "write_seconds": 0}
    (path / "checkpoint.json").write_text(json.dumps(record))

def complete():
    (folder / "COMPLETED").write_text("{}")
"""


def job(script, folder):
    """The words of a command that runs a script after BEGIN."""
    return [sys.executable, "-c", BEGIN + script, "--output_dir", str(folder)]


def supervise(script, folder, *options):
    """Run the supervisor in this process; returns its exit status."""
    return main(["supervise", "--backoff", "0", *options, "--", *job(script, folder)])


def events(folder, name):
    lines = (folder / "supervisor.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


def number_of_starts(folder):
    return len(list((folder / "checkpoints").glob("start*")))


def test_a_complete_run_ends_it(tmp_path, capfd):
    script = 'print("from the job"); step(1); complete(); sys.exit(1)'
    assert supervise(script, tmp_path / "run") == 0
    output = capfd.readouterr()
    assert output.out == "from the job\n"
    assert "is complete" in output.err
    (start,), (end,) = (
        events(tmp_path / "run", "start"),
        events(tmp_path / "run", "end"),
    )
    assert (start["number"], start["checkpoint"]) == (1, None)
    assert (end["status"], end["completed"], end["last_step"]) == (1, True, 1)


def test_status_0_without_completion_is_a_failure(tmp_path, capfd):
    script = "step(started); save(started); complete() if started == 3 else None"
    assert supervise(script, tmp_path / "run") == 0
    assert number_of_starts(tmp_path / "run") == 3
    starts = events(tmp_path / "run", "start")
    checkpoints = [start["checkpoint"] for start in starts]
    assert checkpoints == [None, "step_00000001", "step_00000002"]
    assert "from step_00000002, 2 steps done" in capfd.readouterr().err


def test_a_job_that_was_killed_starts_again(tmp_path):
    script = """
step(started)
if started == 1:
    os.kill(os.getpid(), signal.SIGKILL)
complete()
"""
    assert supervise(script, tmp_path / "run") == 0
    assert [end["status"] for end in events(tmp_path / "run", "end")] == [-9, 0]


def test_a_refused_job_is_not_retried_and_leaves_nothing(tmp_path, capfd):
    script = """
import shutil
shutil.rmtree(folder / "checkpoints")
print("what is wrong", file=sys.stderr)
sys.exit(2)
"""
    assert supervise(script, tmp_path / "run") == 2
    assert "what is wrong" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_gives_up_on_a_step_with_the_evidence(tmp_path, capfd):
    script = """
if started == 1:
    step(1); step(2); save(2)
step(3)
print(f"start {started} fails")
sys.exit(7)
"""
    assert supervise(script, tmp_path / "run") == 1
    assert number_of_starts(tmp_path / "run") == 3
    error = capfd.readouterr().err
    report = error[error.index("giving up") :]
    assert "step 4 has failed 3 times" in report
    assert report.count("ended with status 7") == 3
    assert "from step_00000002, 2 steps done" in report
    assert "  start 3 fails\n" in report
    ends = events(tmp_path / "run", "end")
    assert [end["failed_step"] for end in ends] == [4, 4, 4]
    assert ends[0]["last_lines"] == ["start 1 fails"]
    (decision,) = events(tmp_path / "run", "decision")[-1:]
    assert decision["action"] == "give up"


def test_a_job_that_never_takes_a_step_runs_out_of_restarts(tmp_path, capfd):
    assert supervise("sys.exit(1)", tmp_path / "run", "--max_restarts", "4") == 1
    assert number_of_starts(tmp_path / "run") == 5
    assert "4 restarts in a row have saved no new checkpoint" in capfd.readouterr().err
    assert {end["failed_step"] for end in events(tmp_path / "run", "end")} == {None}


def test_a_hang_is_reported_with_its_ranks(tmp_path, capfd):
    script = f"""
sys.path.insert(0, {str(ROOT)!r})
from ten_dist.monitor.hang_reports import ReportFile
step(4)
for rank, phase in enumerate(["backward", "data"]):
    report = ReportFile(folder / "hang", rank, 2)
    report.open()
    report.update(phase, 5, time.time())
    os.write(report.descriptor, b"Thread 1 (most recent call first):\\n")
sys.exit(4)
"""
    options = ["--max_failures_per_step", "1"]
    assert supervise(script, tmp_path / "run", *options) == 1
    (end,) = events(tmp_path / "run", "end")
    first, second = end["hang"]
    assert first.startswith("rank 1 of 2") and "data of step 5" in first
    assert second.startswith("rank 0 of 2")
    error = capfd.readouterr().err
    assert "hung and ended with status 4" in error and first in error


def test_what_a_job_leaves_behind_is_ended_before_the_next(tmp_path):
    script = """
pid = folder / "checkpoints" / "pid"
if started == 1:
    # In a session of its own, deaf to SIGTERM, and without a parent in a moment.
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    pid.write_text(str(child.pid))
    sys.exit(1)
try:
    state = Path(f"/proc/{pid.read_text()}/stat").read_text().split()[2]
except OSError:
    state = "gone"
if state in ("gone", "Z"):
    complete()
"""
    assert supervise(script, tmp_path / "run", "--max_restarts", "1") == 0
    ended = events(tmp_path / "run", "end")[0]["left_behind"]
    assert len(ended) == 1 and "time.sleep(600)" in ended[0]


def test_a_second_supervisor_is_refused(tmp_path):
    script = """
from contextlib import redirect_stderr
result = subprocess.run(
    [sys.executable, "-m", "launch.supervise", "--", "true", "--output_dir", folder],
    capture_output=True, text=True,
)
(folder / "COMPLETED").write_text(json.dumps([result.returncode, result.stderr]))
"""
    assert supervise(script, tmp_path / "run") == 0
    status, error = json.loads((tmp_path / "run" / "COMPLETED").read_text())
    assert status == 2 and "has a supervisor already" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no command to supervise"),
        (["--", "true"], "the command has no --output_dir"),
        (
            ["--", "true", "--output_dir", "RUN", "--dry_run"],
            "--dry_run writes nothing",
        ),
        (["--", "no such program", "--output_dir", "RUN"], "cannot be started"),
        (["--grace", "-1", "--", "true"], "--grace must be from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["supervise", *words]) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_last_output_dir_counts():
    words = ["deepspeed", "--output_dir", "A", "--steps", "3", "--output_dir=B"]
    assert str(find_output_dir(words)) == "B"


def start_supervisor(script, folder, *options):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.supervise",
            *options,
            "--",
            *job(script, folder),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_job_and_ends_the_supervisor(number, tmp_path):
    script = f"""
def stop(*_):
    save(5)
    sys.exit(3)

signal.signal({int(number)}, stop)
(folder / "ready").touch()
time.sleep(600)
"""
    process = start_supervisor(script, tmp_path / "run")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 3
    assert (
        f"stopped by {number.name}; the same command continues from step_00000005"
        in (error)
    )
    assert number_of_starts(tmp_path / "run") == 1


@pytest.mark.slow
def test_a_job_deaf_to_signals_is_killed_after_its_grace(tmp_path):
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "checkpoints" / "pid").write_text(str(os.getpid()))
(folder / "ready").touch()
time.sleep(600)
"""
    process = start_supervisor(script, tmp_path / "run", "--grace", "1")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 3
    (end,) = events(tmp_path / "run", "end")
    assert end["status"] == -9
    pid = int((tmp_path / "run" / "checkpoints" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_complete_run_that_is_to_be_extended_has_to_begin(tmp_path, capfd):
    """A start that fails before it takes the mark of the earlier end away is no success."""
    assert supervise("step(1); save(1); complete()", tmp_path / "run") == 0
    script = """
if started == 2:
    sys.exit(1)
(folder / "COMPLETED").unlink()
step(2)
complete()
"""
    assert supervise(script, tmp_path / "run") == 0
    assert number_of_starts(tmp_path / "run") == 3
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2

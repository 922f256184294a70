"""The agent of a host with jobs of a few lines instead of trainings."""

import json
import subprocess
import sys
import time

import psutil
import pytest

JOB = [sys.executable, "-c", "import time; time.sleep(600)"]
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open("saved", "w"), sys.exit(3)))
time.sleep(600)
"""


@pytest.fixture
def agent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cluster.agent"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def tell(agent, **request):
    agent.stdin.write(json.dumps(request) + "\n")
    agent.stdin.flush()


def start(agent, folder, command, silence=40.0, **environment):
    tell(
        agent,
        do="start",
        part={
            "command": command,
            "environment": environment,
            "output": str(folder / "node.log"),
            "mark": str(folder),
            "start": f"{folder}/0",
            "first_rank": 0,
            "last_rank": 0,
        },
        master="127.0.0.1",
        logs=str(folder),
        silence=silence,
    )


def events(agent, name):
    """The first event with this name."""
    for line in agent.stdout:
        event = json.loads(line)
        if name in event:
            return event[name]
    raise AssertionError(f"no {name}")


def processes(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEN_DIST_SUPERVISED") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_ends_the_job_when_told(agent, tmp_path):
    start(agent, tmp_path, JOB)
    wait_for(lambda: len(processes(tmp_path)) == 1, 20)
    tell(agent, do="end", grace=5)
    assert len(events(agent, "gone")) == 1
    assert agent.wait(10) == 0
    assert not processes(tmp_path)


def test_it_reports_ranks_and_the_status(agent, tmp_path):
    wait = "import os, sys, time\nwhile not os.path.exists('go'): time.sleep(0.1)"
    start(agent, tmp_path, [sys.executable, "-c", f"{wait}\nsys.exit(7)"], RANK="0")
    wait_for(lambda: len(processes(tmp_path)) == 1, 20)
    # Ranks are looked for every two seconds.
    time.sleep(2.5)
    (tmp_path / "go").touch()
    assert events(agent, "ended_ranks") == [0]
    assert events(agent, "status") == 7


def test_ranks_save_when_the_launcher_is_killed(agent, tmp_path):
    start(agent, tmp_path, [sys.executable, "-c", RANK], RANK="0")
    wait_for(lambda: len(processes(tmp_path)) == 1, 20)
    time.sleep(1)
    agent.stdin.close()
    wait_for(lambda: not processes(tmp_path), 20)
    assert (tmp_path / "saved").exists()
    assert agent.wait(10) == 0


def test_a_host_that_is_cut_off_ends_its_ranks(agent, tmp_path):
    start(agent, tmp_path, JOB, silence=2.0)
    wait_for(lambda: len(processes(tmp_path)) == 1, 20)
    # The launcher has not closed the connection; it only says nothing any more.
    assert agent.wait(20) == 0
    assert not processes(tmp_path)


@pytest.mark.slow
def test_it_refuses_a_folder_that_it_does_not_see(agent, tmp_path):
    start(agent, tmp_path / "elsewhere", JOB)
    assert "put --output_dir on a file system that all hosts" in events(agent, "error")


def test_what_earlier_starts_left_is_ended(agent, tmp_path):
    left = subprocess.Popen(JOB, env={"TEN_DIST_SUPERVISED": str(tmp_path)})
    wait_for(lambda: len(processes(tmp_path)) == 1, 10)
    tell(agent, do="clear", mark=str(tmp_path), grace=5, master="127.0.0.1")
    assert events(agent, "ended") == [f"process {left.pid} ({' '.join(JOB)})"]
    assert left.wait(10) < 0

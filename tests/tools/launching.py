"""Starting real training processes, as a user would."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ten_dist.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODEL = [
    "--config",
    "pico",
    "--dim",
    "32",
    "--n_layers",
    "2",
    "--num_eigenstates",
    "24",
    "--num_heads",
    "2",
]


def free_port():
    """A port that nobody has, below those that the system gives to connections: one of
    these could be taken before the ranks listen at it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def train_command(arguments, ranks, script="launch/train.py", deepspeed=False):
    """Command that trains on `ranks` processes; 0 stands for no launcher at all.

    `deepspeed` has DeepSpeed's launcher start them, as users do, for tests of what it does
    with signals and statuses. It takes three seconds more of a processor's time.
    """
    script = [str(ROOT / script), *map(str, arguments)]
    if ranks == 0:
        return [sys.executable, *script]
    if not deepspeed:
        starter = [sys.executable, str(ROOT / "tests" / "tools" / "start_ranks.py")]
        return [*starter, str(ranks), str(free_port()), *script]
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [sys.executable, str(launcher), *options, *script]


def launch_environment():
    """This process's environment without the ranks of trainings inside it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    names += ("LOCAL_WORLD_SIZE",)
    return {name: value for name, value in os.environ.items() if name not in names}


def train(arguments, ranks=2, expect=0, timeout=240, fault=None, deepspeed=False):
    """Train to the end; returns what was printed.

    `fault` is one of tests/tools/faulty_train.py, `deepspeed` as for `train_command`.
    """
    script, environment = "launch/train.py", launch_environment()
    if fault is not None:
        script, environment["FAULT"] = "tests/tools/faulty_train.py", fault
    command = train_command(arguments, ranks, script, deepspeed)
    return run_to_end(command, environment, expect, timeout)


def train_in_turn(trainings, ranks=2, timeout=600, fault=None):
    """Do trainings, given by their arguments, one after the other in the same ranks, which
    start once; returns what was printed. `fault` is met by each of them."""
    arguments = [json.dumps([*map(str, training)]) for training in trainings]
    environment = launch_environment()
    if fault is not None:
        environment["FAULT"] = fault
    command = train_command(arguments, ranks, "tests/tools/train_in_turn.py")
    return run_to_end(command, environment, 0, timeout)


def train_here(arguments):
    """Train in this process, which has imported torch; returns what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", *map(str, arguments)]) == 0
    return printed.getvalue()


def run_to_end(command, environment, expect, timeout):
    """Run a command; returns what was printed."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == expect, output[-6000:]
    return output


def checkpoint_of(folder, step):
    """Folder of the checkpoint of a step, which is there when it is complete."""
    return Path(folder) / "checkpoints" / f"step_{step:08d}"


def train_until_killed(arguments, folder, step, saved=None, ranks=2, timeout=240):
    """Train, and kill every process with SIGKILL once `step` is in the metrics.

    Checkpoints are written while training goes on: `saved` is a step whose checkpoint has
    to be complete as well.
    """
    process = subprocess.Popen(
        train_command(arguments, ranks),
        cwd=ROOT,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A group of its own, so that all of its processes can be killed at once.
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout

    def reached():
        done = any(m["step"] >= step for m in read_metrics(folder))
        return done and (saved is None or checkpoint_of(folder, saved).is_dir())

    try:
        while not reached():
            assert process.poll() is None, process.stdout.read().decode()[-6000:]
            assert time.monotonic() < deadline, "the step was not reached in time"
            time.sleep(0.02)
    finally:
        # Ranks have sessions of their own under some launchers: find them first.
        pids = descendants(process.pid)
        for pid in [process.pid, *pids]:
            kill(pid)
        process.wait()
        process.stdout.close()


def from_step_four(source, folder):
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(source, folder)
    (folder / "COMPLETED").unlink()
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    return folder


def kill(pid):
    """Kill a process that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def descendants(pid):
    """All processes below a process, from the process table."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rank_processes(pid):
    """What is below a process: {number: process id} of ranks, and ids of what reads data
    for them."""
    ranks, loaders = {}, []
    for below in descendants(pid):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(below)
            number = _rank_of(process)
            if number is None:
                continue
            # What reads data is a child of a rank and says the same of itself.
            parent = process.parent()
            if parent is None or _rank_of(parent) is None:
                ranks[number] = below
            else:
                loaders.append(below)
    return ranks, loaders


def _rank_of(process):
    name = process.name()
    if name.startswith("rank "):  # by start_ranks.py
        return int(name.removeprefix("rank "))
    number = process.environ().get("RANK")
    return None if number is None else int(number)


def read_metrics(folder):
    """Complete lines of the metrics of a run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_metrics(folder, name="loss"):
    """{step: value} of the steps of a run; a step that stands twice fails."""
    values = {}
    for metrics in read_metrics(folder):
        if name in metrics:
            assert metrics["step"] not in values, f"step {metrics['step']} stands twice"
            values[metrics["step"]] = metrics[name]
    return values


def read_ledger(folder):
    """{step: {rank: [(epoch, row), ...]}} of the attempt that counts for each step."""
    entries = {}
    for path in sorted((Path(folder) / "ledger").glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            rows = [(entry["epoch"], row) for row in entry["rows"]]
            by_rank = entries.setdefault((entry["step"], entry["attempt"]), {})
            by_rank.setdefault(rank, []).extend(rows)
    newest = {}
    for (step, attempt), by_rank in sorted(entries.items()):
        newest[step] = by_rank
    return newest

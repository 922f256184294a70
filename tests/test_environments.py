"""Odd environments: the status that is documented, never a traceback, never silence."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from ten_dist.cli import main
from ten_dist.errors import ConfigurationError
from ten_dist.files import write_json
from ten_dist.monitor.event_file import EventFile
from ten_dist.own_rank import (
    VARIABLES,
    OwnRank,
    rank_of_environment,
    without_stray_ranks,
)
from ten_dist.run_folder import RunFolder
from tests.tools.launching import SMALL_MODEL, launch_environment, read_metrics

ROOT = Path(__file__).resolve().parents[1]
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    """Token shards whose text is not ASCII."""
    from data_prep.shard import main as shard

    folder = tmp_path_factory.mktemp("texte")
    (folder / "corpus").mkdir()
    for number in range(4):
        (folder / "corpus" / f"{number}.txt").write_text("à café \u2603 " * 40)
    output = folder / "donn\u00e9es"
    arguments = ["--input", folder / "corpus", "--output", output]
    assert shard([*map(str, arguments), "--tokenizer", "bytes"]) == 0
    return output


def start(arguments, changes=(), **options):
    """A command with variables changed; those that are None are not set."""
    environment = {**launch_environment(), "PYTHONPATH": str(ROOT), **dict(changes)}
    environment = {k: v for k, v in environment.items() if v is not None}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def end_of(process):
    out, errors = process.communicate(timeout=240)
    return process.returncode, out or b"", (errors or b"").decode()


# Commands without ranks, in this process: what they read is what is tested.


@pytest.mark.parametrize("value", ["1", "0", "", "abc", "-1", "99999999999999999999"])
@pytest.mark.parametrize("name", [*RANKS, "PMI_RANK", "OMPI_COMM_WORLD_SIZE"])
def test_rank_variables_are_nothing_to_a_command_without_ranks(
    name, value, text_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(name, value)
    assert main(["data", "inspect", str(text_data)]) == 0
    assert "tokens" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),
        ({"RANK": "abc"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS"),
        ({"PMI_SIZE": "many"}, "PMI_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "abc",
            },
            "MASTER_PORT",
        ),
        ({"DEEPSPEED_TIMEOUT": "abc"}, "DEEPSPEED_TIMEOUT"),
    ],
)
def test_a_training_refuses_what_contradicts_itself(
    variables, named, text_data, tmp_path, monkeypatch, capsys
):
    # Trainings of other tests in this process have left theirs.
    for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = ["--data", text_data, "--output_dir", tmp_path / "run", "--steps", 1]
    arguments += ["--seq_len", 16, "--global_batch_size", 2]
    assert main(["train", *SMALL_MODEL, *map(str, arguments)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "ten-dist:" in x]
    assert named in line
    assert not (tmp_path / "run").exists()


def test_launchers_are_understood():
    torch = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    assert rank_of_environment({}) == OwnRank()
    assert rank_of_environment({"WORLD_SIZE": "", "RANK": " "}) == OwnRank()
    assert rank_of_environment({**torch, "LOCAL_SIZE": "2"}) == OwnRank(3, 4, 1, 2)
    assert rank_of_environment(mpi) == OwnRank(1, 2, 1, 2)
    # What is left of another launcher does not hide the one at work.
    assert rank_of_environment({**mpi, "RANK": "0"}) == OwnRank(1, 2, 1, 2)
    assert rank_of_environment({**mpi, **torch}).rank == 3
    with pytest.raises(ConfigurationError, match="unset"):
        rank_of_environment({"RANK": "1", "OMPI_COMM_WORLD_RANK": "1"})
    # A supervised job inherits ranks that are ranks, and nothing that has been left.
    assert without_stray_ranks(torch) == torch
    assert without_stray_ranks({"RANK": "1", "WORLD_SIZE": "", "A": "b"}) == {"A": "b"}


def test_names_that_are_not_utf8_are_written(tmp_path):
    write_json(tmp_path / "config.json", {"name": "a\udcff\u00e9"})
    assert RunFolder(tmp_path).exists()
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "a\udcff\u00e9"}


@pytest.mark.parametrize("clock", [0, -10_000_000, -1_700_000_000, 10_000_000_000])
def test_every_start_is_on_tensorboard_whatever_the_clock(tmp_path, monkeypatch, clock):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = time.time
    for first, offset in ((0, 0), (5, clock), (8, 0)):
        monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
        events = EventFile(tmp_path, first)
        for step in range(first + 1, first + 8):
            events.write(step, {"loss": first + step / 100, "rate": 1.0})
        # As if it had been killed: what is written is there without an end.
        if offset:
            events.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in found] == list(range(1, 16))
    assert [round(event.value) for event in found] == [0] * 5 + [5] * 3 + [8] * 7


# One light command in environments of all kinds, in processes of its own.

ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "utf-16": {"PYTHONIOENCODING": "utf-16"},
    "C locale": ASCII,
    "an unknown locale": {"LC_ALL": "xx_YY.UTF-99", "LANG": "nonsense"},
    "no home": {"HOME": None},
    "a home that is not there": {"HOME": "/nonexistent/home"},
    "an empty home": {"HOME": ""},
    "no temporary folder": {"TMPDIR": "/nonexistent/tmp"},
    "no columns": {"COLUMNS": "0"},
    "one column": {"COLUMNS": "1"},
    "columns that are no number": {"COLUMNS": "abc", "LINES": "-1"},
    "a dumb terminal": {"TERM": "dumb"},
    "no terminal": {"TERM": None, "NO_COLOR": "1"},
    "python -OO": {"PYTHONOPTIMIZE": "2"},
    "unbuffered": {"PYTHONUNBUFFERED": "1"},
    "no threads": {"OMP_NUM_THREADS": "0"},
    "threads that are no number": {"OMP_NUM_THREADS": "abc"},
    "no GPUs": {"CUDA_VISIBLE_DEVICES": ""},
    "GPU -1": {"CUDA_VISIBLE_DEVICES": "-1"},
    "a relative extension folder": {"TORCH_EXTENSIONS_DIR": "not/there"},
    "empty AWS variables": {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_DEFAULT_REGION": "",
        "AWS_PROFILE": "",
    },
    "an odd time zone": {"TZ": "Nowhere/Never-99"},
    "another accelerator": {"DS_ACCELERATOR": "abc", "DEEPSPEED_TIMEOUT": "abc"},
    "another master": {"MASTER_PORT": "abc", "MASTER_ADDR": ""},
    "ranks of a scheduler": {"SLURM_PROCID": "3", "SLURM_NTASKS": "x", "RANK": "3"},
    "tqdm's variables": {"TQDM_DISABLE": "1", "TQDM_MININTERVAL": "0.1"},
    "no path": {"PATH": ""},
}


@pytest.mark.parametrize("changes", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_text_is_printed_in_any_environment(changes, text_data):
    arguments = ["ten_dist.cli", "data", "sample", text_data, "--count", 1]
    status, out, errors = end_of(start(arguments, changes))
    assert status == 0
    # OpenMP has a word for what it does not understand.
    assert [line for line in errors.splitlines() if line and "OMP" not in line] == []
    encoding = changes.get("PYTHONIOENCODING", "utf-8").split(":")[0]
    text = out.decode("ascii" if changes is ASCII else encoding)
    # What the encoding has no place for is still to be read.
    assert (
        "caf\u00e9 \u2603"
        in text.encode()
        .decode("unicode_escape")
        .encode("latin-1", "backslashreplace")
        .decode("utf-8", "backslashreplace")
        or r"\u2603" in text
    )


def test_a_folder_that_was_removed(text_data, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    arguments = ["ten_dist.cli", "data", "inspect", text_data]
    status, out, errors = end_of(
        start(arguments, cwd=gone, preexec_fn=lambda: os.rmdir(gone))
    )
    assert status == 2 and not out
    assert errors == (
        "ten-dist: the current folder has been removed: change to one that exists\n"
    )


def test_a_clock_before_1980(text_data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() - 1_600_000_000\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = start(
        ["ten_dist.cli", "data", "inspect", text_data], {"PYTHONPATH": path}
    )
    assert end_of(process)[::2] == (0, "")


def test_nothing_may_be_read_by_others(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text " * 50)
    arguments = ["data_prep.shard", "--input", tmp_path / "corpus", "--output"]
    arguments += [tmp_path / "out", "--tokenizer", "bytes"]
    process = start(arguments, preexec_fn=lambda: os.umask(0o777))
    status, _, errors = end_of(process)
    # Root may read and write all the same.
    assert status in (0, 1, 2) and "Traceback" not in errors


# Streams that nobody reads, or that are not there.


def closed(*numbers):
    def close():
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(1,), (2,), (0,), (0, 1, 2)], ids=str)
def test_closed_streams(numbers, text_data, tmp_path):
    arguments = ["ten_dist.cli", "data", "inspect", text_data]
    status, out, errors = end_of(start(arguments, preexec_fn=closed(*numbers)))
    assert status == 0
    assert errors == "" and bool(out) == (1 not in numbers)


@pytest.mark.parametrize("arguments", [["data", "inspect"], ["train", "--help"]])
def test_a_full_disk_behind_the_output(arguments, text_data):
    with open("/dev/full", "wb") as full:
        if arguments[-1] == "inspect":
            arguments = [*arguments, text_data]
        status, _, errors = end_of(start(["ten_dist.cli", *arguments], stdout=full))
    if "--help" in arguments:
        assert (status, errors) == (0, "")
    else:
        assert status == 1 and "No space left on device" in errors
        assert len(errors.splitlines()) == 1


def test_a_reader_that_has_seen_enough(text_data):
    for arguments in (["data", "inspect", text_data], ["train", "--help"]):
        process = start(["ten_dist.cli", *arguments])
        process.stdout.close()
        process.stdout = None
        status, _, errors = end_of(process)
        assert status in (0, 1) and errors == ""


def training(data, folder, *more):
    options = [*SMALL_MODEL, "--data", data, "--output_dir", folder, "--seq_len", 16]
    options += ["--global_batch_size", 2, "--num_workers", 1, *more]
    return ["ten_dist.cli", "train", *options]


@pytest.mark.slow
def test_a_training_goes_on_without_a_reader(text_data, tmp_path):
    process = start(training(text_data, tmp_path / "run", "--steps", 12), ASCII)
    process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    status, _, errors = end_of(process)
    assert status == 0, errors
    assert errors.count("standard output is gone (Broken pipe)") == 1
    assert (tmp_path / "run" / "COMPLETED").is_file()
    # In a locale without UTF-8 what was written is read again.
    command = ["ten_dist.cli", "generate", tmp_path / "run", "--max_new_tokens", 3]
    status, out, errors = end_of(start([*command, "--prompt", "caf"], ASCII))
    assert (status, errors) == (0, "") and out.startswith(b"caf")


def wait_for_steps(process, folder, count=3):
    deadline = time.monotonic() + 240
    while len(read_metrics(folder)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_lost_terminal_saves_and_stops(text_data, tmp_path):
    folder = tmp_path / "run"
    ours, terminal = pty.openpty()
    process = start(
        training(text_data, folder, "--steps", 1_000_000),
        stdout=terminal,
        stderr=terminal,
        # Its controlling terminal, as a shell behind ssh has one.
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    os.set_blocking(ours, False)
    hung_up = threading.Event()

    def show():
        while not hung_up.wait(0.02):
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)

    reader = threading.Thread(target=show)
    reader.start()
    try:
        wait_for_steps(process, folder)
    finally:
        hung_up.set()
        reader.join()
        # The kernel sends SIGHUP, and every write fails with EIO from now on.
        os.close(ours)
    assert process.wait(timeout=120) == 3
    steps = max(m["step"] for m in read_metrics(folder))
    assert (folder / "checkpoints" / f"step_{steps:08d}").is_dir()


@pytest.mark.slow
def test_nohup_goes_on(text_data, tmp_path):
    folder = tmp_path / "run"
    process = start(
        training(text_data, folder, "--steps", 400),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for_steps(process, folder)
    process.send_signal(signal.SIGHUP)
    status, _, errors = end_of(process)
    assert status == 0 and "SIGHUP" not in errors


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_preparation_says_that_it_continues(number, tmp_path):
    (tmp_path / "corpus").mkdir()
    for name in range(20):
        (tmp_path / "corpus" / f"{name}.txt").write_text("some text\n" * 30_000)
    arguments = ["data_prep.shard", "--input", tmp_path / "corpus", "--output"]
    arguments += [tmp_path / "out", "--vocab_size", 300, "--shard_megabytes", "0.3"]
    process = start(arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("shard-*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    status, _, errors = end_of(process)
    assert status == 128 + number
    assert "interrupted (the same command continues)" in errors
    assert "Traceback" not in errors and not list(tmp_path.rglob("*.tmp"))
    status, out, _ = end_of(start(arguments))
    assert status == 0 and b"continuing" in out

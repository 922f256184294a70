"""A preparation that was cut off, anywhere, continues to the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--val_fraction", "0.3", "--vocab_size", "320", "--shard_megabytes", "0.02"]


@pytest.fixture
def small(tmp_path, sentence):
    """A corpus of four shards that is prepared within a fraction of a second."""
    folder = tmp_path / "small"
    folder.mkdir()
    for index in range(20):
        text = f"file {index}: {sentence(index, 800)}\n"
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def whole(tmp_path, prepare):
    """Function: corpus, options -> what an undisturbed preparation of it gives."""

    def run(corpus, *options):
        output = tmp_path / f"whole of {corpus.name}"
        arguments = ["--input", corpus, "--output", output, *OPTIONS, *options]
        status, _, errors = prepare(*arguments)
        assert status == 0, errors
        return contents(output)

    return run


# Kills itself just before the N-th time that a file is given its name, for every N.
KILLED_EVERYWHERE = """
import os, signal, sys
from data_prep.ranks import Ranks
from data_prep.shard import main
corpus, folder, options = sys.argv[1], sys.argv[2], sys.argv[3:]

def run(output, kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls, replace = 0, os.replace

    def counted(*names):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    os.replace = counted
    os._exit(main(["--input", corpus, "--output", output, *options], Ranks()))

moment = 1
while run(f"{folder}/{moment}", moment) == signal.SIGKILL:
    assert not os.path.exists(f"{folder}/{moment}/manifest.json")
    assert run(f"{folder}/{moment}", 0) == 0
    moment += 1
# One folder that gets a shard or two further each time.
attempts = 1
while run(f"{folder}/patience", 9) == signal.SIGKILL:
    attempts += 1
    assert attempts < 9
"""


def test_killed_before_any_file_gets_its_name(tmp_path, small, whole):
    (small / "copy.txt").write_bytes((small / "3.txt").read_bytes())
    done = subprocess.run(
        [
            *(sys.executable, "-c", KILLED_EVERYWHERE),
            *(str(small), str(tmp_path / "killed"), *OPTIONS, "--deduplicate"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = whole(small, "--deduplicate")
    folders = sorted((tmp_path / "killed").iterdir())
    # Two names a unit at least, and those of the tokenizers and manifests.
    assert len(folders) > 15
    for folder in folders:
        assert contents(folder) == expected, folder
    kept = {int(n) for n in re.findall(r"continuing: (\d+) of \d+ shards", done.stdout)}
    assert kept == {0, 1, 2, 3, 4}
    assert "tokenizer: trained before the interruption" in done.stdout


def begun(output):
    return (output / ".preparing" / "source.json").exists()


def trained(output):
    return (output / ".preparing" / "tokenizer.json").exists()


def three_shards(output):
    return len(list((output / ".preparing").glob("unit-*.json"))) >= 3


def start(mpiexec_command, ranks, corpus, output, *options):
    command = ["-m", "data_prep.shard", "--input", str(corpus)]
    command += ["--output", str(output), *(options or OPTIONS)]
    if ranks:
        command = [*mpiexec_command(ranks), "-m", "mpi4py", *command]
    else:
        command = [sys.executable, *command]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def preparing(process):
    """The processes that do the work: the process itself, or the ranks below it."""
    everyone = [psutil.Process(process.pid)]
    everyone += everyone[0].children(recursive=True)
    return [one for one in everyone if "python" in Path(one.exe()).name]


@pytest.mark.parametrize(
    "moment, ranks, ranks_killed, ranks_after",
    [
        (begun, 0, 1, 2),
        (begun, 2, 2, 0),
        pytest.param(trained, 2, 1, 0, marks=pytest.mark.slow),
        pytest.param(three_shards, 2, 2, 3, marks=pytest.mark.slow),
        (three_shards, 2, 1, 0),
        pytest.param(three_shards, 0, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_processes(
    tmp_path,
    corpus,
    prepare,
    whole,
    mpiexec,
    mpiexec_command,
    moment,
    ranks,
    ranks_killed,
    ranks_after,
):
    output = tmp_path / "out"
    process = start(mpiexec_command, ranks, corpus, output)
    deadline = time.monotonic() + 180
    while not moment(output):
        assert process.poll() is None and time.monotonic() < deadline
    # The last: of one rank, the one that does not lead.
    for victim in preparing(process)[-ranks_killed:]:
        victim.send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    assert not (output / "manifest.json").exists()
    arguments = ["--input", corpus, "--output", output, *OPTIONS]
    if ranks_after:
        module = ["-m", "mpi4py", "-m", "data_prep.shard"]
        done = mpiexec(ranks_after, *module, *arguments)
        status, said, errors = done.returncode, done.stdout, done.stderr
    else:
        status, said, errors = prepare(*arguments)
    assert status == 0, errors
    (kept, shards) = re.search(r"continuing: (\d+) of (\d+) shards are", said).groups()
    assert int(kept) >= (3 if moment is three_shards else 0)
    assert int(kept) < int(shards)
    assert contents(output) == whole(corpus)


# A shell that starts a command in the background has it ignore interrupts.
INTERRUPTIBLE = """
import signal, sys
from data_prep.ranks import Ranks
from data_prep.shard import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(ranks=Ranks()))
"""


def test_an_interrupt_from_the_keyboard(tmp_path, corpus, prepare, whole):
    output = tmp_path / "out"
    arguments = ["--input", str(corpus), "--output", str(output), *OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not three_shards(output):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted (the same command continues)" in errors
    assert "Traceback" not in errors
    assert not list(output.rglob("*.tmp"))
    status, said, _ = prepare(*arguments)
    assert status == 0 and re.search(r"continuing: \d+ of \d+ shards are", said)
    assert contents(output) == whole(corpus)


@pytest.fixture
def interrupted(small, tmp_path, prepare, monkeypatch):
    """A folder in which two shards were finished when the disk was full."""
    output = tmp_path / "out"
    assert fail_at_sync(monkeypatch, 11, prepare, small, output)[0] == 1
    assert len(list((output / ".preparing").glob("unit-*.json"))) == 2
    return output


def fail_at_sync(monkeypatch, count, prepare, corpus, output):
    """Prepare with a disk that is full from the given call of fsync on."""
    calls, sync = 0, os.fsync

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        return prepare("--input", corpus, "--output", output, *OPTIONS)


def test_a_full_disk_is_named_and_continued_after(
    tmp_path, small, prepare, whole, monkeypatch
):
    """Whenever it happens; and every time it gets further."""
    output = tmp_path / "out"
    status, _, errors = fail_at_sync(monkeypatch, 1, prepare, small, output)
    assert status == 2 and "No space left on device" in errors and not output.exists()
    for count in (2, 3, 4, 6, 7):
        status, _, errors = fail_at_sync(monkeypatch, count, prepare, small, output)
        lines = [line for line in errors.splitlines() if "error: " in line]
        assert status == 1 and len(lines) == 1 and "Traceback" not in errors
        assert str(output) in lines[0] and "no space left on device" in lines[0]
        assert not (output / "manifest.json").exists()
        assert not list(output.rglob("*.tmp"))
    assert "the same command continues" in lines[0]
    # Full from the start: refused, and what was finished is kept.
    assert fail_at_sync(monkeypatch, 1, prepare, small, output)[0] == 2
    status, said, _ = prepare("--input", small, "--output", output, *OPTIONS)
    assert status == 0 and re.search(r"continuing: [1-3] of 4 shards are there", said)
    assert contents(output) == whole(small)


FULL_DISK = """
mount -t tmpfs -o size=$SIZE none "$DISK" || exit 99
"$@"; echo "status $?"
find "$DISK" -name '*.tmp'
mount -o remount,size=64m "$DISK"
"$@"; echo "status $?"
cp -r "$DISK/out" "$KEPT"
"""


def test_a_disk_that_is_really_full(tmp_path, small, whole):
    (tmp_path / "disk").mkdir()
    expected = whole(small)
    # Too little by the records and the blocks that files fill only in part.
    size = sum(map(len, expected.values()))
    done = subprocess.run(
        [
            *("unshare", "-Urm", "bash", "-c", FULL_DISK, "bash"),
            *(sys.executable, "-m", "data_prep.shard", "--input", str(small)),
            *("--output", str(tmp_path / "disk" / "out"), *OPTIONS),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SIZE": str(size),
            "DISK": str(tmp_path / "disk"),
            "KEPT": str(tmp_path / "kept"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode in (1, 99) and "status" not in done.stdout:
        pytest.skip("a file system of its own cannot be mounted here")
    assert re.findall(r"status (\d+)", done.stdout) == ["1", "0"], done.stderr
    assert ".tmp" not in done.stdout
    assert re.search(r"error: \S+: no space left on device", done.stderr)
    assert re.search(r"continuing: [1-3] of 4 shards are there", done.stdout)
    assert contents(tmp_path / "kept") == expected


def test_a_shard_that_is_not_as_recorded_is_made_again(
    small, prepare, whole, interrupted
):
    first, second = sorted(interrupted.rglob("shard-*.tar"))[:2]
    # Of the same size, but not the same.
    with open(first, "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    (interrupted / "shard-09999.tar").write_bytes(b"of another run")
    (interrupted / "val" / "shard-09999.tar.tmp").write_bytes(b"partial")
    record = interrupted / ".preparing" / "unit-00001.json"
    status, said, _ = prepare("--input", small, "--output", interrupted, *OPTIONS)
    assert status == 0 and second.exists() and not record.exists()
    assert "continuing: 1 of 4 shards are there" in said
    assert contents(interrupted) == whole(small)


def test_records_and_a_tokenizer_that_are_damaged_count_for_nothing(
    small, prepare, whole, interrupted
):
    journal = interrupted / ".preparing"
    (journal / "unit-00000.json").write_text('{"unit": 0')
    record = json.loads((journal / "unit-00001.json").read_text())
    del record["val"]["documents"]
    (journal / "unit-00001.json").write_text(json.dumps(record))
    trained = (journal / "tokenizer.json").read_text()
    (journal / "tokenizer.json").write_text(trained.replace("256", "255"))
    status, said, _ = prepare("--input", small, "--output", interrupted, *OPTIONS)
    assert status == 0 and "continuing: 0 of 4 shards" in said
    assert "trained on" in said and "trained before" not in said
    assert contents(interrupted) == whole(small)


@pytest.mark.parametrize("change", ["options", "names", "times", "old marker"])
def test_another_corpus_or_other_options_start_over(
    small, prepare, interrupted, change, tmp_path
):
    arguments = ["--input", small, *OPTIONS]
    if change == "options":
        arguments += ["--exclude", "1.txt"]
    elif change == "names":
        (small / "new.txt").write_text("new")
    elif change == "times":
        # The same size, another content.
        data = (small / "3.txt").read_bytes()
        (small / "3.txt").write_bytes(data.replace(b"state", b"STATE"))
    else:
        for path in (interrupted / ".preparing").iterdir():
            path.unlink()
        (interrupted / ".preparing").rmdir()
        (interrupted / ".preparing").touch()
    (interrupted / "notes.md").write_text("the user's")
    status, said, _ = prepare(*arguments, "--output", interrupted)
    assert status == 0 and said.startswith("starting over: ")
    assert "another corpus or with other options" in said and "continuing" not in said
    assert (interrupted / "notes.md").read_text() == "the user's"
    (interrupted / "notes.md").unlink()
    assert prepare(*arguments, "--output", tmp_path / "fresh")[0] == 0
    assert contents(interrupted) == contents(tmp_path / "fresh")


def test_a_wrong_option_does_not_touch_what_was_finished(small, prepare, interrupted):
    before = contents(interrupted)
    arguments = ["--input", small, "--output", interrupted, *OPTIONS]
    for wrong in (["--vocab_size", "25"], ["--exclude", "*"], ["--val_fraction", "2"]):
        assert prepare(*arguments, *wrong)[0] == 2
    assert contents(interrupted) == before

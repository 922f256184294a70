"""One preparation at a time into a folder, and none locked out by one that is gone."""

from __future__ import annotations

import errno
import fcntl
import signal

import pytest

from tests.conftest import contents
from tests.data_prep.test_continue import begun, preparing, start

BYTES = ("--tokenizer", "bytes", "--shard_megabytes", "0.02")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_second_preparation_is_refused_and_disturbs_nothing(
    tmp_path, corpus, prepare, mpiexec_command, ranks
):
    output = tmp_path / "out"
    process = start(mpiexec_command, ranks, corpus, output, *BYTES)
    while not begun(output):
        assert process.poll() is None
    workers = preparing(process)
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    before = contents(output)
    arguments = ["--input", corpus, "--output", output]
    # The same, and another that would start over.
    for options in (BYTES, ("--tokenizer", "bytes")):
        status, _, errors = prepare(*arguments, *options)
        assert status == 2 and errors.count("error: ") == 1
        assert f"another preparation is writing to --output {output}" in errors
    assert contents(output) == before
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    assert prepare("--input", corpus, "--output", tmp_path / "alone", *BYTES)[0] == 0
    assert contents(output) == contents(tmp_path / "alone")


def test_where_there_are_no_locks_that_is_said(tmp_path, corpus, prepare, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    output = tmp_path / "out"
    status, said, _ = prepare("--input", corpus, "--output", output, *BYTES)
    assert status == 0
    assert f"the file system of {output} has no locks: see that no second" in said
    assert not [path for path in output.iterdir() if path.name.startswith(".")]

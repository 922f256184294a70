"""A signal on any rank has all ranks save and stop, and the run goes on exactly."""

import os
import signal
import subprocess
import time

import pytest

from tests.tools.launching import (
    ROOT,
    SMALL_MODEL,
    descendants,
    kill,
    launch_environment,
    rank_processes,
    read_metrics,
    step_metrics,
    train,
    train_command,
    train_here,
    train_in_turn,
)

pytestmark = pytest.mark.slow

STEPS = 24
OPTIONS = [
    *SMALL_MODEL,
    *("--steps", STEPS, "--global_batch_size", 8, "--seq_len", 512),
    *("--precision", "fp32", "--eval_interval", 12, "--checkpoint_interval", 100),
]


@pytest.fixture(scope="module")
def whole(token_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "run"
    options = [*OPTIONS, "--data", token_data]
    train([*options, "--output_dir", folder])
    return options, step_metrics(folder), step_metrics(folder, "val_loss")


class Job:
    """A training of two ranks under way."""

    def __init__(self, arguments, folder, ranks=2, deepspeed=True):
        self.folder = folder
        self.process = subprocess.Popen(
            # Through DeepSpeed's launcher, which has signals and statuses of its own.
            train_command(arguments, ranks, deepspeed=deepspeed),
            cwd=ROOT,
            env=launch_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*descendants(self.process.pid), self.process.pid]:
            kill(pid)
        self.process.wait()
        self.process.stdout.close()

    def wait_for(self, ready):
        deadline = time.monotonic() + 240
        while not ready():
            assert self.process.poll() is None, self.process.stdout.read()[-6000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_step(self, step):
        self.wait_for(lambda: any(m["step"] >= step for m in read_metrics(self.folder)))

    def end(self):
        """Status and output."""
        output = self.process.communicate(timeout=240)[0]
        return self.process.returncode, output


# By the rank that the signal goes to; None stands for the whole job, as Ctrl-C at a terminal
# does it.
SIGNALS = {
    signal.SIGTERM: 0,
    signal.SIGHUP: 1,
    signal.SIGUSR1: 1,
    signal.SIGINT: None,
}


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """{signal: (folder, status, output, steps done)} of trainings that one has stopped."""
    found = {}
    for number, rank in SIGNALS.items():
        folder = tmp_path_factory.mktemp(number.name) / "run"
        options = [*whole[0], "--output_dir", folder]
        # The launcher has no part in a signal to a rank, but in the statuses and in Ctrl-C.
        with Job(options, folder, deepspeed=number != signal.SIGUSR1) as job:
            job.wait_for_step(3)
            if rank is None:
                os.killpg(job.process.pid, number)
            else:
                os.kill(rank_processes(job.process.pid)[0][rank], number)
            found[number] = folder, *job.end(), max(step_metrics(folder))
    return found


@pytest.mark.parametrize("number", SIGNALS)
def test_all_ranks_save_and_stop(stopped, number):
    folder, status, output, done = stopped[number]
    assert "saved: the same command continues" in output, output[-3000:]
    # Of a Ctrl-C the launcher makes its own status.
    assert status == 3 or SIGNALS[number] is None, output[-3000:]
    assert 3 <= done < STEPS
    assert (folder / "checkpoints" / f"step_{done:08d}").is_dir()


def test_what_was_stopped_goes_on_exactly(stopped, whole):
    options, losses, held_out = whole
    output = train_in_turn(
        [*options, "--output_dir", folder] for folder, *_ in stopped.values()
    )
    for folder, _, _, done in stopped.values():
        assert f"step_{done:08d}, {done} steps done" in output
        assert step_metrics(folder) == losses, folder
        assert step_metrics(folder, "val_loss") == held_out, folder


def test_stopped_in_a_validation(token_data, tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    # Many small batches, so that there is time to come in between.
    options += ["--steps", 2, "--eval_interval", 2, "--eval_rows", 0]
    options += ["--val_data", token_data, "--seq_len", 16, "--micro_batch_size", 1]
    with Job(options, folder, ranks=0) as job:
        job.wait_for_step(2)
        time.sleep(0.2)
        os.kill(job.process.pid, signal.SIGTERM)
        status, output = job.end()
    assert status == 3, output[-3000:]
    assert "stopped after step 2 of 2" in output
    assert not step_metrics(folder, "val_loss")
    assert not (folder / "COMPLETED").exists()
    train_here(options)
    assert list(step_metrics(folder, "val_loss")) == [2]


def consumed(folder):
    """Whether rank 0 has begun its first step."""
    ledger = folder / "ledger" / "rank0000.jsonl"
    return ledger.is_file() and ledger.stat().st_size > 0


def test_a_second_signal_ends_at_once(token_data, tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    # A step of half a minute.
    options += ["--micro_batch_size", 1, "--global_batch_size", 2048, "--ledger"]
    with Job(options, folder, ranks=0) as job:
        job.wait_for(lambda: consumed(folder))
        os.kill(job.process.pid, signal.SIGTERM)
        time.sleep(1.5)
        assert job.process.poll() is None
        os.kill(job.process.pid, signal.SIGTERM)
        status, output = job.end()
    assert status == 128 + signal.SIGTERM
    assert "a second signal stops it at once" in output


def test_the_grace_period_ends(token_data, tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    options += ["--micro_batch_size", 1, "--global_batch_size", 2048, "--ledger"]
    with Job([*options, "--grace_seconds", 2], folder, ranks=0) as job:
        job.wait_for(lambda: consumed(folder))
        os.kill(job.process.pid, signal.SIGTERM)
        status, output = job.end()
    assert status == 3
    assert "not at the end of a step after 2 s of grace" in output

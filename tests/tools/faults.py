"""A campaign of faults against one supervised run; it must end as if there were none.

    python -m tests.tools.faults [--faults 50] [--seed 0] [--steps 400] [--ranks 2] [--kinds KIND ...]

Two runs of the same options: one undisturbed, and one under `ten-dist supervise` to which
faults happen at random moments. At the end their final losses must agree, and the ledger
must hold every row exactly once. The faults:

- job: SIGKILL to every process of the job
- rank: SIGKILL to one rank
- loader: SIGKILL to a process that reads data
- stop: SIGSTOP to one rank, which is then there and does nothing: a hang
- term: SIGTERM to one rank, as a node that is taken away
- truncate, flip: SIGKILL to the job, then the newest checkpoint loses its tail, or a bit
- full: the disk fills up, and is freed after the job has failed (needs a mounted tmpfs)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.conftest import write_corpus
from tests.tools.launching import (
    ROOT,
    SMALL_MODEL,
    descendants,
    kill,
    launch_environment,
    rank_processes,
    read_ledger,
    read_metrics,
    step_metrics,
    train,
    train_command,
)

KINDS = ("job", "rank", "loader", "stop", "term", "truncate", "flip", "full")
TMPFS_MEGABYTES = 64
BATCH = 8


def options(data, steps):
    """Options of both runs."""
    return [
        *SMALL_MODEL,
        *(
            "--use_hten",
            "--hten_scales",
            "1,2",
            "--dropout",
            0.1,
            "--precision",
            "fp32",
        ),
        *("--data", data, "--steps", steps, "--global_batch_size", BATCH),
        *("--micro_batch_size", 2, "--seq_len", 128, "--checkpoint_interval", 3),
        *("--num_workers", 1),
        *("--keep_checkpoints", 4, "--eval_interval", 10_000, "--ledger"),
        *("--data_verification", "size", "--hang_timeout", 8, "--startup_timeout", 120),
    ]


@contextlib.contextmanager
def run_folder(small_disk):
    """A folder for a run; on a small disk of its own where that is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MEGABYTES}m", "tmpfs"]
        mounted = (
            small_disk
            and os.geteuid() == 0
            and subprocess.run([*mount, folder], check=False).returncode == 0
        )
        try:
            yield Path(folder) / "run", mounted
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


class Campaign:
    """Faults to the job of a supervisor, one after the other."""

    def __init__(self, supervisor, folder, kinds, count, seed):
        self.supervisor = supervisor
        self.folder = folder
        self.kinds = kinds
        self.draw = random.Random(seed)
        self.left = count
        self.happened = Counter()

    def run(self):
        """Make all faults happen, or as many as the run lasts for."""
        while self.left and self.supervisor.poll() is None:
            # Also in a start, before any step: then nothing new is waited for.
            if self.draw.random() < 0.8:
                self._wait_for_steps(self.draw.randint(1, 6))
            time.sleep(self.draw.random() * 0.4)
            kind = self.draw.choice(self.kinds)
            if self.supervisor.poll() is None and self._strike(kind):
                self.left -= 1
                self.happened[kind] += 1
                print(f"{kind} at step {self._step()}", flush=True)

    def _step(self):
        return max((m["step"] for m in read_metrics(self.folder)), default=0)

    def _wait_for_steps(self, count):
        target = self._step() + count
        while self.supervisor.poll() is None and self._step() < target:
            time.sleep(0.02)

    def _strike(self, kind):
        """Make a fault happen; whether it could."""
        found, loaders = rank_processes(self.supervisor.pid)
        ranks = list(found.values())
        if not ranks:
            return False
        if kind in ("job", "truncate", "flip"):
            for pid in [*ranks, *loaders]:
                kill(pid)
            if kind != "job":
                self._damage(kind)
        elif kind == "rank":
            kill(self.draw.choice(ranks))
        elif kind == "loader":
            if not loaders:
                return False
            kill(self.draw.choice(loaders))
        elif kind in ("stop", "term"):
            number = signal.SIGSTOP if kind == "stop" else signal.SIGTERM
            if kind == "stop" and self._step() == 0:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.draw.choice(ranks), number)
        elif kind == "full":
            self._fill_disk(ranks)
        return True

    def _damage(self, kind):
        folder = self.folder / "checkpoints"
        for checkpoint in sorted(folder.glob("step_????????"), reverse=True)[:1]:
            file = self.draw.choice(sorted(checkpoint.iterdir()))
            content = bytearray(file.read_bytes())
            if kind == "truncate":
                content = content[: self.draw.randrange(len(content))]
            else:
                content[self.draw.randrange(len(content))] ^= 1
            file.write_bytes(content)

    def _fill_disk(self, ranks):
        ballast = self.folder.parent / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(map(psutil.pid_exists, ranks)):
            time.sleep(0.05)
        ballast.unlink()


def campaign(faults, seed, steps, ranks, kinds=KINDS, deepspeed=True):
    """Run it; without `deepspeed` tests/tools/start_ranks.py starts the supervised ranks.

    Returns:
        How often each fault happened, and starts of the job.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_folder("full" in kinds) as (folder, small_disk),
    ):
        from data_prep.shard import main as shard

        corpus = write_corpus(Path(scratch) / "corpus", files=60)
        data = Path(scratch) / "data"
        arguments = ["--input", corpus, "--output", data, "--tokenizer", "bytes"]
        assert shard([str(a) for a in [*arguments, "--shard_megabytes", 0.02]]) == 0
        whole = Path(scratch) / "whole"
        given = options(data, steps)
        fault = "short_pipes"
        train([*given, "--output_dir", whole], ranks, timeout=1800, fault=fault)
        if not small_disk:
            kinds = [kind for kind in kinds if kind != "full"]
        supervisor = [sys.executable, "-m", "launch.supervise", "--backoff", "0.2"]
        supervisor += ["--max_backoff", "1", "--max_restarts", "20", "--grace", "20"]
        supervisor += ["--max_failures_per_step", "20", "--"]
        given += ["--output_dir", folder]
        script = "tests/tools/faulty_train.py"
        job = train_command(given, ranks, script, deepspeed)
        log = Path(scratch) / "supervisor.log"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [*supervisor, *job],
                cwd=ROOT,
                env=launch_environment() | {"FAULT": fault},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running = Campaign(process, folder, list(kinds), faults, seed)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            status = process.wait(timeout=3600)
        finally:
            for pid in [*descendants(process.pid), process.pid]:
                kill(pid)
            thread.join()
        assert status == 0, log.read_text()[-8000:]
        check_same(whole, folder)
        lines = (folder / "supervisor.jsonl").read_text().splitlines()
        starts = sum(json.loads(line)["event"] == "start" for line in lines)
        return dict(running.happened), starts


def check_same(whole, folder):
    """See that a run has the losses and the rows of another."""
    expected, found = step_metrics(whole), step_metrics(folder)
    assert found.keys() == expected.keys()
    different = {s: (found[s], expected[s]) for s in found if found[s] != expected[s]}
    assert not different, f"losses differ: {list(different.items())[:5]}"
    final = [json.loads((run / "COMPLETED").read_text()) for run in (whole, folder)]
    assert final[0]["loss"] == final[1]["loss"]
    rows = [
        sorted(
            row
            for ranks in read_ledger(run).values()
            for of_rank in ranks.values()
            for row in of_rank
        )
        for run in (whole, folder)
    ]
    assert rows[0] == rows[1], "not the same rows"
    assert len(rows[1]) == len(expected) * BATCH
    assert max(Counter(rows[1]).values()) == 1, "a row was used twice in an epoch"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.faults} faults, {given.steps} steps", flush=True)
    started = time.monotonic()
    happened, starts = campaign(
        given.faults, given.seed, given.steps, given.ranks, given.kinds
    )
    print(
        f"ended as the undisturbed run: {sum(happened.values())} faults "
        f"({', '.join(f'{n} {kind}' for kind, n in sorted(happened.items()))}), "
        f"{starts} starts, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()

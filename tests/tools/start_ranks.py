"""Starts the ranks of a training on this machine, as torchrun does.

    python tests/tools/start_ranks.py RANKS PORT SCRIPT [ARGUMENT ...]

To import torch and DeepSpeed takes longer than most trainings of the tests: ranks are copies
of this process, which has done it once. The `deepspeed` launcher does it twice more before
any rank starts.

The status is 0, or that of the first rank that fails; the others are then ended. SIGTERM is
passed on to the ranks. An interrupt from the keyboard reaches them without this.
"""

import ctypes
import importlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

SECONDS_BEFORE_SIGKILL = 10
PR_SET_NAME = 15
# Torch's optimizers import its compiler.
IMPORTED_BY_RANKS = ("ten_dist.engine.run", "torch._dynamo")


class Rank:
    """The process of a rank, which runs a script with its arguments."""

    def __init__(self, number, ranks, port, command):
        self.status = None
        self._pid = os.fork()
        if self._pid == 0:
            _become(number, ranks, port, command)

    def poll(self):
        """The status, -N after signal N; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self._pid, number)


def _become(number, ranks, port, command):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    # The environment that others see of this process is that of its parent.
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {number}".encode())
    os.environ.update({name: str(value) for name, value in given.items()})
    # What a rank has printed is there also when it is killed.
    sys.stdout.reconfigure(write_through=True)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


def first_failure(processes):
    """Wait for a status that is not 0, or for all to end."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            return failed[0] if failed else 0
        time.sleep(0.05)


def end(processes):
    """End what still runs."""
    deadline = time.monotonic() + SECONDS_BEFORE_SIGKILL
    for process in processes:
        process.send_signal(signal.SIGTERM)
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.send_signal(signal.SIGKILL)
        time.sleep(0.02)


def main():
    """The command line; returns the status, 128 + N after signal N."""
    ranks, port, *command = sys.argv[1:]
    for module in IMPORTED_BY_RANKS:
        importlib.import_module(module)
    processes = []

    def pass_on(number, _frame):
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    # Not SIG_IGN, which the ranks would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    for number in range(int(ranks)):
        processes.append(Rank(number, ranks, port, command))
    status = first_failure(processes)
    end(processes)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())

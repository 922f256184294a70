"""Starts the ranks of a training on this machine, as torchrun does.

    python tests/tools/start_ranks.py RANKS PORT SCRIPT [ARGUMENT ...]

The `deepspeed` launcher imports torch and DeepSpeed twice before any rank starts, which
takes longer than most trainings of the tests. This imports nothing of the kind.

The status is 0, or that of the first rank that fails; the others are then ended. SIGTERM is
passed on to the ranks. An interrupt from the keyboard reaches them without this.
"""

import os
import signal
import subprocess
import sys
import time

SECONDS_BEFORE_SIGKILL = 10


def start(number, ranks, port, command):
    """Process of a rank."""
    given = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = os.environ | {name: str(value) for name, value in given.items()}
    # Unbuffered: what a rank has printed is there also when it is killed.
    return subprocess.Popen([sys.executable, "-u", *command], env=environment)


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
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    """The command line; returns the status, 128 + N after signal N."""
    ranks, port, *command = sys.argv[1:]
    processes = []

    def pass_on(number, _frame):
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    # Not SIG_IGN, which the ranks would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    for number in range(int(ranks)):
        processes.append(start(number, ranks, port, command))
    status = first_failure(processes)
    end(processes)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())

"""Reading ahead in worker processes.

Each worker writes to a pipe of its own and this process reads the pipes in turn. There
is no lock, thread or shared memory between them, so an interrupt at any moment leaves
nothing to hang on: whoever finds the other end of a pipe closed stops.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import TypeVar

from ten_dist.errors import DataError

T = TypeVar("T")
Produce = Callable[[int, int], Iterator[T]]
"""produce(first, stride): every ``stride``-th item of a sequence, from ``first`` on."""

_READ_AHEAD_BYTES = 1 << 20
_PARENT_CHECK_SECONDS = 5.0


def read_ahead(produce: Produce[T], workers: int) -> Iterator[T]:
    """Yield ``produce(0, 1)``, in order, made by ``workers`` processes.

    Worker w makes ``produce(w, workers)``, a few items ahead: as many as fit in a pipe.
    The workers end with the iterator, and with this process however that ends.

    Raises:
        DataError: as raised in a worker, in its place in the order.
        RuntimeError: a worker ended without a word; its exit status says why.
    """
    # Forked workers start at once and share the loaded modules; they use no GPU.
    context = multiprocessing.get_context("fork")
    processes: list[ForkProcess] = []
    pipes: list[Connection] = []

    def end() -> None:
        # Once: when the interpreter ends, what this needs may be gone at the second time.
        while processes:
            # Nothing is lost with a worker, and it ignores anything milder.
            process = processes.pop()
            process.kill()
            process.join()

    # A program that ends in between would ask its workers to end, and wait.
    atexit.register(end)
    try:
        for worker in range(workers):
            pipe, sender = context.Pipe(duplex=False)
            pipes.append(pipe)
            process = context.Process(
                target=_work,
                args=(produce, worker, workers, sender, pipe, os.getpid()),
                name=f"data-worker-{worker}",
                daemon=True,
            )
            process.start()
            processes.append(process)
            # With the worker's the only copy, its end is the end of the pipe.
            sender.close()
        turn = 0
        while True:
            try:
                item, error, ended = pipes[turn].recv()
            except (EOFError, OSError):
                processes[turn].join()
                raise RuntimeError(
                    f"data worker {turn} ended unexpectedly, with exit status "
                    f"{processes[turn].exitcode}"
                ) from None
            if error is not None:
                raise error
            if ended:
                return
            yield item
            turn = (turn + 1) % workers
    finally:
        end()
        atexit.unregister(end)
        for pipe in pipes:
            pipe.close()


def _work(
    produce: Produce[T],
    worker: int,
    workers: int,
    sender: Connection,
    receiver: Connection,
    parent: int,
) -> None:
    receiver.close()
    # A signal to stop reaches every process of a terminal or launcher. The parent then
    # finishes its step first, and needs this worker for that; the worker ends with it.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent(_signal: int, _frame: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    # A killed parent closes the pipe, unless some other child of it has a copy.
    signal.signal(signal.SIGALRM, end_with_parent)
    signal.setitimer(signal.ITIMER_REAL, _PARENT_CHECK_SECONDS, _PARENT_CHECK_SECONDS)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # Refused where the user has many pipes already: then it reads less far ahead.
        with contextlib.suppress(OSError):
            fcntl.fcntl(sender.fileno(), fcntl.F_SETPIPE_SZ, _READ_AHEAD_BYTES)
    with contextlib.suppress(BrokenPipeError):
        try:
            for item in produce(worker, workers):
                sender.send((item, None, False))
        except DataError as error:
            sender.send((None, error, True))
        else:
            sender.send((None, None, True))

"""The MPI ranks of a preparation, or the one process that stands in for them.

Three things can happen to ranks together: rank 0 decides something for all, all work on
their share while rank 0 watches, and any of them fails. A failure is known to all ranks
before any of them ends, so that none is left waiting and one message is printed.
"""

from __future__ import annotations

import heapq
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias, TypeVar

from ten_dist.errors import ConfigurationError
from ten_dist.files import printable
from ten_dist.own_rank import read_number
from ten_dist.termination import interrupt_still

T = TypeVar("T")
Tick = Callable[[int, int], None]
"""Called by a job after each piece of its work: bytes got through, tokens they gave."""

_READY, _REPORT, _STOP = 1, 2, 3
_POLL_SECONDS = 0.02
_REPORT_SECONDS = 0.5
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


class FileError(Exception):
    """A file could not be read or written: no space left, a failing disk.

    Neither the corpus nor the options are at fault, so what is finished can be kept.
    """


Failure: TypeAlias = ConfigurationError | FileError


class _StoppedError(Exception):
    """Another rank failed: this one's work is of no use any more."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _failure(error: ConfigurationError | OSError) -> Failure:
    """The error as it is told to every rank, in one line."""
    if isinstance(error, OSError):
        if error.filename is None or not error.strerror:
            return FileError(_one_line(error))
        reason = error.strerror[0].lower() + error.strerror[1:]
        return FileError(f"{printable(str(error.filename))}: {reason}")
    return type(error)(_one_line(error))


class Ranks:
    """``rank`` and ``size`` of this process, and what the ranks do together."""

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = comm.rank if comm is not None else 0
        self.size: int = comm.size if comm is not None else 1
        self._stop_received = False

    @classmethod
    def start(cls) -> tuple[Ranks, str | None]:
        """The ranks of this program, and what to tell the user if MPI is not there.

        Raises:
            ConfigurationError: an MPI launcher started several processes that cannot
                see each other: each would do all of the work, into the same files.
        """
        started = max(read_number(os.environ, name, 1) for name in _SIZE_VARIABLES)
        comm, notice = None, None
        try:
            # Imported here because the import starts MPI, and may fail.
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = _one_line(error)
            notice = f"MPI is not available ({reason}): running as one process"
        else:
            comm = MPI.COMM_WORLD
            # Open MPI forwards SIGHUP to nobody.
            interrupt_still()
        ranks = cls(comm)
        if started > ranks.size:
            left = [name for name in _SIZE_VARIABLES if os.environ.get(name)]
            reason = notice.split(":")[0] if notice else "mpi4py uses another MPI"
            raise ConfigurationError(
                f"mpiexec started {started} processes but each sees only itself: "
                f"{reason}; use the mpiexec of the MPI library that mpi4py uses, or "
                f"run without mpiexec and with {' and '.join(left)} unset"
            )
        return ranks, notice

    def from_root(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0; its result is the result on every rank.

        Raises:
            ConfigurationError: on every rank, where ``action`` raised it.
            FileError: on every rank, where ``action`` raised ``OSError``.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = action()
            except (ConfigurationError, OSError) as error:
                failure = _failure(error)
        result, failure = self._broadcast((result, failure))
        if failure is not None:
            raise failure
        return result

    def work(self, job: Callable[[Tick], T], on_tick: Tick) -> list[T] | None:
        """Run ``job`` on every rank; rank 0 returns the results, in order of rank.

        On rank 0 ``on_tick`` is told of the work that any rank has got through. When a
        rank fails the others stop at their next tick.

        Raises:
            ConfigurationError: on every rank, where any job raised it.
            FileError: on every rank, where any job raised ``OSError``.
        """
        if self.rank == 0:
            failure, results, stopped = self._lead(job, on_tick)
        else:
            failure, results, stopped = None, None, []
            self._stop_received = False
            self._follow(job)
        failure, stopped = self._broadcast((failure, stopped))
        if self.rank in stopped and not self._stop_received:
            self._comm.recv(source=0, tag=_STOP)
        if failure is not None:
            raise failure
        return results

    def barrier(self) -> None:
        """Wait for all ranks, so that none ends while another still has to report."""
        if self._comm is not None:
            self._comm.barrier()

    def abort(self, status: int) -> NoReturn:
        """End every rank at once, with the given status."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._comm is not None and self.size > 1:
            self._comm.Abort(status)
        sys.exit(status)

    def _lead(
        self, job: Callable[[Tick], T], on_tick: Tick
    ) -> tuple[Failure | None, list[T] | None, list[int]]:
        failures: dict[int, Failure] = {}
        results: dict[int, T] = {}
        waiting = set(range(1, self.size))

        def collect() -> None:
            while waiting and self._comm.iprobe(tag=_REPORT):
                rank, seen, result, failure = self._comm.recv(tag=_REPORT)
                on_tick(*seen)
                if failure is not None:
                    failures[rank] = failure
                    waiting.discard(rank)
                elif result is not None:
                    results[rank] = result[0]
                    waiting.discard(rank)

        def tick(count: int, tokens: int) -> None:
            on_tick(count, tokens)
            collect()
            if failures:
                raise _StoppedError

        try:
            results[0] = job(tick)
        except _StoppedError:
            pass
        except (ConfigurationError, OSError) as error:
            failures[0] = _failure(error)
        stopped: list[int] = []
        while waiting:
            if failures and not stopped:
                stopped = sorted(waiting)
                for other in stopped:
                    self._comm.send(None, dest=other, tag=_STOP)
            time.sleep(_POLL_SECONDS)
            collect()
        if failures:
            return failures[min(failures)], None, stopped
        return None, [results[rank] for rank in range(self.size)], stopped

    def _follow(self, job: Callable[[Tick], T]) -> None:
        unreported, reported_at = (0, 0), time.monotonic()

        def tick(count: int, tokens: int) -> None:
            nonlocal unreported, reported_at
            if self._comm.iprobe(source=0, tag=_STOP):
                self._comm.recv(source=0, tag=_STOP)
                self._stop_received = True
                raise _StoppedError
            unreported = (unreported[0] + count, unreported[1] + tokens)
            if time.monotonic() - reported_at >= _REPORT_SECONDS:
                report = (self.rank, unreported, None, None)
                self._comm.send(report, dest=0, tag=_REPORT)
                unreported, reported_at = (0, 0), time.monotonic()

        result, failure = None, None
        try:
            result = (job(tick),)
        except _StoppedError:
            result = (None,)
        except (ConfigurationError, OSError) as error:
            failure = _failure(error)
        report = (self.rank, unreported, result, failure)
        self._comm.send(report, dest=0, tag=_REPORT)

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            # Neither waiting nor a copy of what may be large.
            return value
        # Ranks that wait inside a broadcast spin, and would take processor time from
        # rank 0; so they sleep until it is there.
        if self.rank == 0:
            for other in range(1, self.size):
                self._comm.send(None, dest=other, tag=_READY)
        else:
            while not self._comm.iprobe(source=0, tag=_READY):
                time.sleep(_POLL_SECONDS)
            self._comm.recv(source=0, tag=_READY)
        return self._comm.bcast(value, root=0)


def assign_units(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each unit, largest first, to the rank with the least to do so far."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(unit)
        heapq.heappush(loads, (load + sizes[unit], rank))
    return shares

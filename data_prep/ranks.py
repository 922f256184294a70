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
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

from tqdm import tqdm

from ten_dist.errors import ConfigurationError
from ten_dist.files import printable
from ten_dist.own_rank import read_number
from ten_dist.termination import interrupt_still

T = TypeVar("T")
Tick = Callable[[int, int], None]
"""Called by a job after each piece of its work: bytes got through, tokens they gave."""

_REPORT, _STOP, _ANSWER = 1, 2, 3
_POLL_SECONDS = 0.02
_REPORT_SECONDS = 0.5
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


class FileError(Exception):
    """A file could not be read or written: no space left, a failing disk.

    Neither the corpus nor the options are at fault, so what is finished can be kept.
    """


Failure: TypeAlias = ConfigurationError | FileError


class _StoppedError(Exception):
    """Another rank failed, so that the work of this one is of no use any more."""


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


_Outcome: TypeAlias = tuple[T | None, Failure | None]


def _outcome_of(action: Callable[[], T]) -> _Outcome[T]:
    """What an action returns, and the failure that it raises instead."""
    try:
        return action(), None
    except _StoppedError:
        return None, None
    except (ConfigurationError, OSError) as error:
        return None, _failure(error)


class Ranks:
    """``rank`` and ``size`` of this process, and what the ranks do together."""

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = comm.rank if comm is not None else 0
        self.size: int = comm.size if comm is not None else 1

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
        outcome: Any = _outcome_of(action) if self.rank == 0 else None
        if self.size > 1:
            # The outcome may be large, so it is broadcast; the answer says when.
            if self.rank == 0:
                self._tell_others(None, _ANSWER)
            else:
                self._wait_for_answer()
            outcome = self._comm.bcast(outcome, root=0)
        result, failure = outcome
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
            failure, results = self._lead(job, on_tick)
        else:
            failure, results = self._follow(job), None
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
    ) -> tuple[Failure | None, list[T]]:
        outcomes: dict[int, _Outcome[T]] = {}

        def failure() -> Failure | None:
            failed = [
                rank for rank, (_, error) in outcomes.items() if error is not None
            ]
            return outcomes[min(failed)][1] if failed else None

        def collect() -> None:
            while self.size > 1 and self._comm.iprobe(tag=_REPORT):
                rank, seen, outcome = self._comm.recv(tag=_REPORT)
                on_tick(*seen)
                if outcome is not None:
                    outcomes[rank] = outcome

        def tick(count: int, tokens: int) -> None:
            on_tick(count, tokens)
            collect()
            if failure() is not None:
                raise _StoppedError

        outcomes[0] = _outcome_of(lambda: job(tick))
        stopped = False
        while len(outcomes) < self.size:
            if failure() is not None and not stopped:
                stopped = True
                self._tell_others(None, _STOP)
            time.sleep(_POLL_SECONDS)
            collect()
        # Not before all have reported: what they report next belongs to other work.
        answer = (failure(), stopped)
        self._tell_others(answer, _ANSWER)
        return answer[0], [cast(T, outcomes[rank][0]) for rank in range(self.size)]

    def _follow(self, job: Callable[[Tick], T]) -> Failure | None:
        unreported, reported_at = (0, 0), time.monotonic()

        def tick(count: int, tokens: int) -> None:
            nonlocal unreported, reported_at
            if self._comm.iprobe(source=0, tag=_STOP):
                raise _StoppedError
            unreported = (unreported[0] + count, unreported[1] + tokens)
            if time.monotonic() - reported_at >= _REPORT_SECONDS:
                report = (self.rank, unreported, None)
                self._comm.send(report, dest=0, tag=_REPORT)
                unreported, reported_at = (0, 0), time.monotonic()

        outcome = _outcome_of(lambda: job(tick))
        self._comm.send((self.rank, unreported, outcome), dest=0, tag=_REPORT)
        failure, stopped = self._wait_for_answer()
        if stopped:
            self._comm.recv(source=0, tag=_STOP)
        return failure

    def _tell_others(self, value: Any, tag: int) -> None:
        for other in range(1, self.size):
            self._comm.send(value, dest=other, tag=tag)

    def _wait_for_answer(self) -> Any:
        # A rank that waits inside a call of MPI keeps a core busy, which rank 0 may need:
        # so it sleeps until the answer can be received at once.
        while not self._comm.iprobe(source=0, tag=_ANSWER):
            time.sleep(_POLL_SECONDS)
        return self._comm.recv(source=0, tag=_ANSWER)


def assign_units(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each unit, largest first, to the rank with the least to do so far."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(unit)
        heapq.heappush(loads, (load + sizes[unit], rank))
    return shares


def work_on_units(
    ranks: Ranks,
    job: Callable[[int, Tick], T],
    title: str,
    sizes: Sequence[int],
    missing: Sequence[int],
) -> list[T]:
    """Do a job for each of the ``missing`` units; the results, on rank 0 alone.

    A bar on rank 0 shows bytes of the corpus, MB/s and, if any, tokens/s. It starts at
    what is not missing; the rates are those of this start.

    Raises:
        ConfigurationError, FileError: as :meth:`Ranks.work`.
    """
    rest = [sizes[unit] for unit in missing]
    share = assign_units(rest, ranks.size)[ranks.rank]
    with tqdm(
        total=sum(sizes),
        initial=sum(sizes) - sum(rest),
        desc=title,
        unit="B",
        unit_scale=True,
        # In a log file each update is a line of its own.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=ranks.rank != 0,
    ) as bar:
        started = time.monotonic()
        tokens = 0

        def show(count: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            if tokens:
                rate = tokens / max(time.monotonic() - started, 1e-3)
                text = f"{tqdm.format_sizeof(rate)} tokens/s"
                bar.set_postfix_str(text, refresh=False)
            bar.update(count)

        results = ranks.work(
            lambda tick: [job(missing[index], tick) for index in share], show
        )
    return [result for part in results or [] for result in part]

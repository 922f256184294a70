"""One start of a job: its processes and what they print."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol, TextIO

import psutil

from ten_dist.arguments import check_text
from ten_dist.config_file import options_in
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.own_rank import without_stray_ranks
from ten_dist.supervision.signals import SignalledJob

MARK = "TEN_DIST_SUPERVISED"
"""Environment variable of every process of a job: the folder of its run. Launchers put
ranks into sessions of their own, and a rank whose launcher was killed belongs to nobody;
the environment they all keep."""
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")
_SECONDS_FOR_SIGKILL = 20.0


def find_output_dir(command: Sequence[str]) -> Path:
    """The folder of the run that a command trains.

    Raises:
        ConfigurationError: it names none, or is a dry run, which has none.
    """
    # The last one counts, as for the command itself.
    given: dict[str, str | None] = {}
    for word, value in zip(command, [*command[1:], None]):
        name, equals, joined = word.partition("=")
        if name == "--no-dry_run":
            given.pop("--dry_run", None)
        given[name] = joined if equals else value
    in_file = {}
    if path := given.get("--config_file"):
        in_file = options_in(path)
    if "--no-dry_run" not in given and in_file.get("dry_run") == "true":
        given["--dry_run"] = None
    for name in ("--dry_run", "--print_config"):
        if name in given:
            raise ConfigurationError(
                f"{name} writes nothing that shows its success: run it without supervisor"
            )
    found = given.get("--output_dir") or in_file.get("output_dir")
    if isinstance(found, str):
        check_text([f"--output_dir={found}"])
    else:
        raise ConfigurationError(
            "the command has no --output_dir, where a supervisor sees how far it is: "
            "give it one"
        )
    return Path(found)


class StartedJob(SignalledJob, Protocol):
    """One start of a job."""

    @property
    def reason(self) -> str | None:
        """How it ended, in words, where its status does not say; then after poll."""

    def end(self, grace: float) -> list[str]:
        """End whatever is left of the job and collect what it has printed.

        Args:
            grace: seconds between SIGTERM and SIGKILL.

        Returns:
            What had to be ended, in words.

        Raises:
            TrainingError: a process cannot be killed.
        """

    def last_lines(self) -> list[str]:
        """The last lines of the output, oldest first."""


class Jobs(Protocol):
    """What a supervisor starts, again and again."""

    @property
    def command(self) -> Sequence[str]:
        """Its words, for the log."""

    def prepare(self, grace: float) -> list[str]:
        """End what is left of earlier starts, as :meth:`StartedJob.end` does.

        Raises:
            ConfigurationError: the job cannot be started at all.
            TrainingError: a process cannot be killed.
        """

    def start(self) -> StartedJob:
        """Start it once more.

        Raises:
            ConfigurationError: it cannot be started, and could not be later.
        """


@dataclasses.dataclass(frozen=True)
class CommandJobs:
    """A command of this machine as a job."""

    command: Sequence[str]
    mark: str
    """Identifies its processes, see :data:`MARK`."""
    keep_lines: int
    """Last lines of its output to keep."""

    def prepare(self, grace: float) -> list[str]:
        """See :meth:`Jobs.prepare`."""
        return end_processes(self.mark, grace)

    def start(self) -> Job:
        """See :meth:`Jobs.start`."""
        return Job(self.command, self.mark, self.keep_lines)


class Job:
    """Starts a command in a session of its own and passes on what it prints.

    Args:
        command, mark, keep_lines: as of :class:`CommandJobs`.

    Raises:
        ConfigurationError: there is no such command.
    """

    reason = None

    def __init__(self, command: Sequence[str], mark: str, keep_lines: int) -> None:
        self._mark = mark
        self._tail: collections.deque[str] = collections.deque(maxlen=keep_lines)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={**without_stray_ranks(os.environ), MARK: mark},
            )
        except OSError as error:
            raise ConfigurationError(
                f"{command[0]} cannot be started: {error.strerror}"
            ) from None
        process = self._process
        self._readers = [
            threading.Thread(target=self._pass_on, args=streams, daemon=True)
            for streams in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def poll(self) -> int | None:
        """Exit status of the command's own process."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Pass a signal to every rank of this machine, or where there is none, to the command.

        Not to the launcher, which would end the ranks before they have saved.
        """
        if not signal_ranks(self._mark, number):
            with contextlib.suppress(OSError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill every process of the job at once."""
        kill_processes(self._mark)

    def end(self, grace: float) -> list[str]:
        """End what is left; see :meth:`StartedJob.end`."""
        ended = end_processes(self._mark, grace)
        self._process.wait()
        for reader in self._readers:
            # A process that left the job on purpose may hold the pipe open.
            reader.join(5.0)
        return ended

    def last_lines(self) -> list[str]:
        """The last lines of the output, oldest first."""
        return list(self._tail)

    def _pass_on(self, source: IO[bytes], sink: TextIO) -> None:
        rest = b""
        while chunk := os.read(source.fileno(), 1 << 16):
            # Nobody listening is no reason to stop the job.
            with contextlib.suppress(OSError, ValueError):
                sink.buffer.write(chunk)
                sink.buffer.flush()
            *lines, rest = (rest + chunk).split(b"\n")
            self._keep(lines)
        self._keep([rest])

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines:
            # Of a progress bar, what was drawn last.
            text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
            if text.strip():
                self._tail.append(text)


def signal_ranks(mark: str, number: int, variable: str = MARK) -> bool:
    """Send a signal to every rank of a job on this machine; whether there is one."""
    own = marked(mark, variable)
    ranks = {pid: p for pid, p in own.items() if rank_of(p) is not None}
    found = False
    for process in ranks.values():
        with contextlib.suppress(psutil.Error):
            # Their data workers are told by them.
            if process.ppid() not in ranks:
                process.send_signal(number)
                found = True
    return found


def kill_processes(mark: str, variable: str = MARK) -> None:
    """Kill all processes with a mark at once."""
    for process in marked(mark, variable).values():
        with contextlib.suppress(psutil.Error):
            process.kill()


def end_processes(mark: str, grace: float, variable: str = MARK) -> list[str]:
    """End all processes with a mark: SIGTERM, and SIGKILL after `grace` seconds.

    Args:
        mark: value of the variable.
        grace: seconds; with 0 they are killed at once.
        variable: name of it.

    Returns:
        What had to be ended, in words.

    Raises:
        TrainingError: one cannot be killed.
    """
    ended: dict[int, str] = {}
    for number, seconds in (
        (signal.SIGTERM, grace),
        (signal.SIGKILL, _SECONDS_FOR_SIGKILL),
    ):
        if not seconds:
            continue
        found = list(marked(mark, variable).values())
        for process in found:
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline()[:4])
                ended[process.pid] = f"process {process.pid} ({words})"
                process.send_signal(number)
        deadline = time.monotonic() + seconds
        while any(map(is_alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
    left = marked(mark, variable)
    if left:
        raise TrainingError(
            f"process {next(iter(left))} of the job cannot be killed, and a restart beside "
            "it would damage the run: restart the machine"
        )
    return list(ended.values())


def marked(mark: str, variable: str = MARK) -> dict[int, psutil.Process]:
    """Living processes of this machine with a mark, but for this one and those above it."""
    above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            has_mark = process.environ().get(variable) == mark
            if has_mark and process.pid not in above and is_alive(process):
                found[process.pid] = process
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie, which stays if nobody adopts it, does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def rank_of(process: psutil.Process) -> int | None:
    """The rank that a process is or works for; None of a launcher."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        environment = process.environ()
        for name in _RANK_VARIABLES:
            if name in environment:
                return int(environment[name])
    return None

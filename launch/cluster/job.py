"""One start of a training on several hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time

from launch.cluster.config import tell
from launch.cluster.connection import Connection, clear_hosts
from launch.cluster.rank_logs import Follower, last_lines, rank_log
from launch.cluster.start import HostsStart
from launch.remote import Remote
from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_STOPPED,
    TrainingError,
)

# Ranks end together, but for those that write what the others wait for, or report.
_SECONDS_FOR_OTHERS = {0: 120.0, EXIT_STOPPED: 30.0, EXIT_HANG: 30.0}
_SECONDS_AFTER_A_FAILURE = 10.0
_SECONDS_FOR_SIGKILL = 25.0
_MOST_LOGS = 2


class HostsJob:
    """Starts the ranks on all hosts, and ends them on all."""

    def __init__(self, start: HostsStart, remote: Remote) -> None:
        self.reason: str | None = None
        self._start, self._remote = start, remote
        self._host_timeout = start.launch.config.host_timeout
        self._status: int | None = None
        # How the first host ended, or the first one that failed, and when.
        self._first: tuple[int, float] | None = None
        self._lost: list[Connection] = []
        self._ended_ranks: list[int] = []
        self._last_lines: list[str] = []
        start.write()
        self._follower = Follower(rank_log(start.logs, 0))
        request = {
            "do": "start",
            "master": start.master_address,
            "logs": str(start.logs),
            "silence": self._host_timeout,
        }
        self._connections = [
            Connection(
                remote,
                host,
                request | {"part": dataclasses.asdict(start.on_node(node))},
            )
            for node, host in enumerate(start.hosts)
        ]

    def poll(self) -> int | None:
        """See :meth:`ten_dist.supervision.job.StartedJob.poll`."""
        if self._status is None:
            for connection in self._connections:
                connection.keep_alive()
            self._status = self._judge()
            if self._status is not None and self._status not in (0, EXIT_STOPPED):
                self._last_lines = self._evidence()
        return self._status

    def _judge(self) -> int | None:
        """Exit status of the whole, or None while it runs."""
        for connection in self._connections:
            if connection.error is not None:
                text, refused = connection.error
                self.reason = f"{connection.host}: {text}"
                return EXIT_CONFIGURATION_ERROR if refused else EXIT_FAILED
        for connection in self._connections:
            why = connection.lost(self._host_timeout)
            if why is not None:
                self._lost.append(connection)
                self.reason = f"host {connection.host} is lost, {why}"
        if self._lost:
            return EXIT_FAILED
        for connection in self._connections:
            new = [r for r in connection.ended_ranks if r not in self._ended_ranks]
            self._ended_ranks += new
        now = time.monotonic()
        for status in (connection.status for connection in self._connections):
            # A host's success says nothing once another has failed.
            if status is not None and (
                self._first is None or status and not self._first[0]
            ):
                self._first = status, now
        if self._first is None:
            return None
        status, since = self._first
        patience = _SECONDS_FOR_OTHERS.get(status, _SECONDS_AFTER_A_FAILURE)
        complete = all(c.status is not None for c in self._connections)
        return status if complete or now - since >= patience else None

    def _evidence(self) -> list[str]:
        """The last lines of the ranks that ended first, told where not seen already."""
        if self.reason is not None:
            return []
        start, lines, unseen = self._start, [], []
        keep = start.launch.supervision.keep_lines
        # Where none is known, the first rank of the host whose launcher has failed.
        failed = [node for node, c in enumerate(self._connections) if c.status]
        first = start.ranks_of(failed[0] if failed else 0).start
        for rank in self._ended_ranks[:_MOST_LOGS] or [first]:
            node = start.node_of(rank)
            # One that failed before it had a log has its words in that of the launcher.
            paths = rank_log(start.logs, rank), start.node_log(node)
            path = next((path for path in paths if last_lines(path, keep)), paths[1])
            where = f"rank {rank} on {start.hosts[node]} was among the first to end"
            block = [f"{where}, end of {path}:"]
            block += [f"  {line}" for line in last_lines(path, keep)]
            lines += block
            if path != rank_log(start.logs, 0):
                unseen += block
        self._follower.close()
        if unseen:
            tell("\n".join(unseen))
        return lines

    def send(self, number: int) -> None:
        """Pass a signal to the ranks of all hosts."""
        for connection in self._connections:
            connection.tell(do="signal", number=number)

    def kill(self) -> None:
        """Kill every process of the job on all hosts."""
        for connection in self._connections:
            connection.tell(do="kill")

    def end(self, grace: float) -> list[str]:
        """See :meth:`ten_dist.supervision.job.StartedJob.end`.

        A host that does not answer ends its own, see :mod:`launch.cluster.agent`.
        """
        # Without all of the ranks nothing can be saved.
        grace = 0.0 if self._lost else grace
        # The agent may be what was lost, and the host be there.
        unattended = [lost.host for lost in self._lost if lost.closed]
        in_touch = [
            connection
            for connection in self._connections
            if connection not in self._lost and connection.error is None
        ]
        for connection in in_touch:
            connection.tell(do="end", grace=grace)
        deadline = time.monotonic() + grace + _SECONDS_FOR_SIGKILL
        while not all(c.closed for c in in_touch) and time.monotonic() < deadline:
            time.sleep(0.05)
        for connection in self._connections:
            connection.close()
        self._follower.close()
        if self._status == EXIT_CONFIGURATION_ERROR:
            # What was refused leaves nothing.
            shutil.rmtree(self._start.logs)
            with contextlib.suppress(OSError):
                self._start.logs.parent.rmdir()
        for connection in in_touch:
            if connection.error is not None:
                raise TrainingError(f"{connection.host}: {connection.error[0]}")
        mark, master = self._start.launch.mark, self._start.master_address
        answers, _ = clear_hosts(self._remote, unattended, mark, 0.0, master)
        ended = [(connection.gone, connection.host) for connection in in_touch]
        ended += [(answer.ended, answer.host) for answer in answers]
        return [f"{len(found)} processes on {host}" for found, host in ended if found]

    def last_lines(self) -> list[str]:
        """See :meth:`ten_dist.supervision.job.StartedJob.last_lines`."""
        return self._last_lines

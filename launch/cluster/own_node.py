"""One host's ranks, started on the host itself: `ten-dist launch --no_ssh`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.cluster.config import Launch
from launch.cluster.node import Node
from launch.cluster.rank_logs import Follower, last_lines, rank_log
from launch.cluster.start import HostsStart
from launch.hosts import Host
from launch.rank_environment import interface_towards, with_interface
from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_STOPPED,
    ConfigurationError,
)
from ten_dist.supervision.job import MARK, end_processes
from ten_dist.supervision.signals import PassedSignals

_SECONDS_FOR_LEFTOVERS = 10.0


def own_node_rank(given: int | None, hosts: Sequence[Host]) -> int:
    """Which of the hosts this machine is.

    Args:
        given: --node_rank, or None.
        hosts: all hosts.

    Raises:
        ConfigurationError: nothing says it, or there is no such host.
    """
    text = os.environ.get("SLURM_NODEID") if given is None else str(given)
    if text is None:
        raise ConfigurationError(
            "--no_ssh needs --node_rank N: which line of the hosts this machine is, "
            "from 0"
        )
    if not text.isdecimal() or int(text) >= len(hosts):
        raise ConfigurationError(
            f"--node_rank must be from 0 to {len(hosts) - 1}, as there are "
            f"{len(hosts)} hosts, not {text}"
        )
    return int(text)


def run_own_node(
    launch: Launch, node: int, master_port: int, tell: Callable[[str], None]
) -> int:
    """Start the ranks of this host, and wait for their end; they are not started again.

    Args:
        launch: what to start and where.
        node: which of the hosts this is.
        master_port: port of the first host where the ranks meet.
        tell: prints a line.

    Returns:
        Exit status: that of the training.

    Raises:
        ConfigurationError: there is no way to the master.
        TrainingError: processes of the job cannot be killed.
    """
    if os.environ.get(MARK) != launch.mark:
        # Those of a supervisor that runs this are its own.
        end_processes(launch.mark, _SECONDS_FOR_LEFTOVERS)
    # Every host finds the same number: it changes when all ranks have met.
    folder = launch.folder
    begun = folder.read().attempts if folder.exists() else 0
    master = launch.master_address(launch.hosts)
    with tempfile.TemporaryDirectory(prefix="ten_dist_") as temporary:
        start = HostsStart(
            launch=launch,
            hosts=launch.hosts,
            master_port=master_port,
            logs=launch.logs / f"start_{begun + 1:03d}",
            hostfile=Path(temporary) / "hostfile",
            environment=with_interface(launch.environment, interface_towards(master)),
        )
        start.write()
        status, ended = _run_to_the_end(start, node, tell)
    if status == EXIT_CONFIGURATION_ERROR:
        _remove_logs(start, node)
    if status in (0, EXIT_CONFIGURATION_ERROR, EXIT_STOPPED):
        return status
    for rank in [rank for rank in ended if rank][:1]:
        path = rank_log(start.logs, rank)
        lines = "\n".join(last_lines(path, launch.supervision.keep_lines))
        tell(f"rank {rank} ended early, end of {path}:\n{lines}")
    return status if 0 < status <= EXIT_HANG else EXIT_FAILED


def _run_to_the_end(
    start: HostsStart, node: int, tell: Callable[[str], None]
) -> tuple[int, list[int]]:
    """Start the ranks of a host and wait for them, passing signals on.

    Returns:
        Exit status, and the ranks that had ended by then, in their order.
    """
    ranks = start.ranks_of(node)
    with PassedSignals(tell) as signals:
        tell(f"ranks {ranks[0]} to {ranks[-1]}, what they print is in {start.logs}")
        # Rank 0 speaks for all.
        follower = Follower(rank_log(start.logs, 0)) if node == 0 else None
        job = Node(start.on_node(node))
        try:
            status = signals.wait(job, start.launch.supervision.grace)
            return status, job.ended_ranks()
        finally:
            job.end(_SECONDS_FOR_LEFTOVERS)
            if follower is not None:
                follower.close()


def _remove_logs(start: HostsStart, node: int) -> None:
    """Remove what this host has written of a start that was refused."""
    for rank in start.ranks_of(node):
        rank_log(start.logs, rank).unlink(missing_ok=True)
    start.node_log(node).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        start.logs.rmdir()
        start.logs.parent.rmdir()
        start.logs.parent.parent.rmdir()

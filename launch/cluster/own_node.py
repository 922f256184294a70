"""One host's ranks, started on the host itself: `ten-dist launch --no_ssh`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.config import Launch, tell
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
    """Number of this machine among the hosts: --node_rank, or that of Slurm.

    Raises:
        ConfigurationError: neither is given, or there is no such host.
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


def run_own_node(launch: Launch, node: int, master_port: int) -> int:
    """Start the ranks of this host, which has the number `node`; returns their exit status.

    They are not started again.

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
        ranks = start.ranks_of(node)
        with PassedSignals(tell).caught() as signals, contextlib.ExitStack() as ends:
            tell(f"ranks {ranks[0]} to {ranks[-1]}, what they print is in {start.logs}")
            if node == 0:
                # Rank 0 speaks for all.
                ends.callback(Follower(rank_log(start.logs, 0)).close)
            job = Node(start.on_node(node))
            ends.callback(job.end, _SECONDS_FOR_LEFTOVERS)
            status = signals.wait(job, launch.supervision.grace)
            ended = job.ended_ranks()
    if status == EXIT_CONFIGURATION_ERROR:
        _remove_logs(start, node)
    if status in (0, EXIT_CONFIGURATION_ERROR, EXIT_STOPPED):
        return status
    # What rank 0 has printed was shown already.
    rank = next((rank for rank in ended if rank), None)
    if rank is not None:
        path = rank_log(start.logs, rank)
        lines = "\n".join(last_lines(path, launch.supervision.keep_lines))
        tell(f"rank {rank} ended early, end of {path}:\n{lines}")
    return status if 0 < status <= EXIT_HANG else EXIT_FAILED


def _remove_logs(start: HostsStart, node: int) -> None:
    """Remove what this host has written of a start that was refused."""
    for rank in start.ranks_of(node):
        rank_log(start.logs, rank).unlink(missing_ok=True)
    start.node_log(node).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in (start.logs, *start.logs.parents[:2]):
            folder.rmdir()

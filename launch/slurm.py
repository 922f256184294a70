"""Starting the ranks of a Slurm allocation with srun."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.hosts import Host


def srun_command(
    hosts: Sequence[Host], options: Sequence[str], train: Sequence[str]
) -> list[str]:
    """A command that runs `ten-dist launch --no_ssh` once on every node.

    Each task finds its number in SLURM_NODEID. Slurm itself ends all tasks when one fails
    or its node is lost.

    Args:
        hosts: nodes of the allocation.
        options: of `ten-dist launch`.
        train: options of the training.
    """
    nodes = str(len(hosts))
    listed = ",".join(f"{host.address}:{host.slots}" for host in hosts)
    return [
        "srun",
        *("--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"),
        *("--nodelist", ",".join(host.address for host in hosts)),
        # By default a task gets one processor.
        *("--cpu-bind", "none", "--kill-on-bad-exit=1", "--export=ALL"),
        *(sys.executable, "-m", "ten_dist.cli", "launch", "--no_ssh"),
        *("--hosts", listed, *options, "--", *train),
    ]

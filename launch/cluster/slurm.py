"""Starting the ranks of a Slurm allocation with srun."""

from __future__ import annotations

import sys

from launch.cluster.config import Launch


def srun_command(launch: Launch, master_port: int) -> list[str]:
    """A command that runs `ten-dist launch --no_ssh` once on every node.

    Each task finds its number in SLURM_NODEID. Slurm itself ends all tasks when one fails
    or its node is lost.

    Args:
        launch: what to start and where.
        master_port: port of the first node where the ranks meet.
    """
    hosts = launch.hosts
    nodes = str(len(hosts))
    variables = [f"{name}={value}" for name, value in launch.environment.items()]
    return [
        "srun",
        *("--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"),
        *("--nodelist", ",".join(host.address for host in hosts)),
        # By default a task gets one processor.
        *("--cpu-bind", "none", "--kill-on-bad-exit=1", "--export=ALL"),
        *(sys.executable, "-m", "ten_dist.cli", "launch", "--no_ssh"),
        *("--hosts", ",".join(f"{host}:{host.slots}" for host in hosts)),
        *("--master_address", launch.master_address(hosts)),
        *("--master_port", str(master_port)),
        *("--grace", f"{launch.supervision.grace:g}"),
        *(word for text in variables for word in ("--env", text)),
        *("--", *launch.train),
    ]

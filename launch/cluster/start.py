"""What one start of a training on several hosts consists of: ranks, variables, commands."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from launch.cluster.rank_logs import RANK_LOGS
from launch.hosts import Host

TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


@dataclasses.dataclass(frozen=True)
class HostsStart:
    """What is to be started."""

    hosts: list[Host]
    master_address: str
    master_port: int
    environment: dict[str, str]
    """Variables of the ranks."""
    train: list[str]
    """Options of the training."""
    mark: str
    """Of the job, see :data:`ten_dist.supervision.job.MARK`."""
    start: str
    """Of this start, see :data:`launch.cluster.node.START`."""
    logs: Path
    """Folder of this start's logs, on all hosts."""
    hostfile: Path
    """Where DeepSpeed finds the hosts."""

    def mark_of(self, node: int) -> str:
        """Value of :data:`launch.cluster.node.START` on a host."""
        return f"{self.start}/{node}"

    def ranks_of(self, node: int) -> range:
        """Ranks that run on a host."""
        first = sum(host.slots for host in self.hosts[:node])
        return range(first, first + self.hosts[node].slots)

    def node_log(self, node: int) -> Path:
        """What DeepSpeed's launcher prints; the ranks have logs of their own."""
        return self.logs / f"node{node:04d}.log"

    def node_of(self, rank: int) -> int:
        """Number of the host that a rank runs on."""
        nodes = range(len(self.hosts))
        return next(node for node in nodes if rank in self.ranks_of(node))

    def exports(self) -> dict[str, str]:
        """Variables of the ranks, and where they write what they print."""
        return {**self.environment, RANK_LOGS: str(self.logs)}

    def node_command(self, node: int) -> list[str]:
        """The command that starts the ranks of one host, on that host."""
        return [
            *(*_DEEPSPEED, "--hostfile", str(self.hostfile)),
            *("--no_ssh", "--node_rank", str(node)),
            *("--master_addr", self.master_address),
            *("--master_port", str(self.master_port)),
            *(str(TRAIN_SCRIPT), *self.train),
        ]

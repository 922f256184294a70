"""One start of a training on several hosts: its ranks, variables and commands."""

from __future__ import annotations

import dataclasses
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.config import Launch
from launch.cluster.node import NodeStart
from launch.cluster.rank_logs import RANK_LOGS
from launch.hosts import Host, count_slots, write_hostfile

TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


@dataclasses.dataclass(frozen=True)
class HostsStart:
    """A start of the ranks on all hosts that take part."""

    launch: Launch
    hosts: list[Host]
    """Those that take part."""
    master_port: int
    """Port of the first one where the ranks meet."""
    logs: Path
    """Folder of this start's logs, on all hosts."""
    hostfile: Path
    """File that DeepSpeed finds the hosts in."""
    environment: dict[str, str]
    """Variables of the ranks."""
    more: Sequence[str] = ()
    """Options of the training after those that were given."""
    identifier: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def master_address(self) -> str:
        """Address of the first host where the ranks meet."""
        return self.launch.master_address(self.hosts)

    def write(self) -> None:
        """Make the folder of logs, and write the hostfile."""
        self.logs.mkdir(parents=True, exist_ok=True)
        write_hostfile(self.hostfile, self.hosts)

    def ranks_of(self, node: int) -> range:
        """Ranks that run on a host."""
        first = count_slots(self.hosts[:node])
        return range(first, first + self.hosts[node].slots)

    def node_log(self, node: int) -> Path:
        """What DeepSpeed's launcher prints; the ranks have logs of their own."""
        return self.logs / f"node{node:04d}.log"

    def node_of(self, rank: int) -> int:
        """Number of the host that a rank runs on."""
        return next(n for n, _ in enumerate(self.hosts) if rank in self.ranks_of(n))

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
            *(str(TRAIN_SCRIPT), *self.launch.train, *self.more),
        ]

    def on_node(self, node: int) -> NodeStart:
        """The part of one host."""
        ranks = self.ranks_of(node)
        return NodeStart(
            command=self.node_command(node),
            environment=self.exports(),
            output=str(self.node_log(node)),
            mark=self.launch.mark,
            start=f"{self.identifier}/{node}",
            first_rank=ranks[0],
            last_rank=ranks[-1],
        )

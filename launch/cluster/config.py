"""Options of `ten-dist launch`, and the command line that they make up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from launch.droplets.removal import ReapingConfig
from launch.hosts import Host, resolve
from launch.remote import SshConfig
from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import PORT, Options, at_least
from ten_dist.config.training import TrainingConfig
from ten_dist.run_folder import RunFolder
from ten_dist.supervision import supervisor
from ten_dist.supervision.policy import SupervisionConfig

NAME = "ten-dist launch"


def tell(message: str) -> None:
    """Print a line of the launcher."""
    supervisor.tell(NAME, message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig(Options):
    """How the ranks of a training are started; each field is an option of
    `ten-dist launch`."""

    GROUP: ClassVar[str] = "hosts"

    launcher: Literal["ssh", "slurm"] = "ssh"
    """ssh: an ssh to each host, which starts its ranks with `deepspeed --no_ssh`; slurm:
    srun, inside of an allocation."""
    node_rank: int | None = None
    """With --no_ssh, which of the hosts this machine is, from 0; by default
    SLURM_NODEID."""
    master_address: str | None = None
    """Address of the first host in the network that joins them; by default what its name
    resolves to."""
    master_port: Annotated[int | None, PORT] = None
    """Port at which the ranks find each other on the first host; by default a free one,
    with --no_ssh and slurm 29500."""
    # Hosts and launcher write to each other every few seconds.
    host_timeout: Annotated[float, at_least(10, most=LONGEST_SECONDS)] = 40.0
    """Seconds without a word from a host after which it is lost: the run goes on from its
    newest checkpoint on the others."""
    min_hosts: Annotated[int, at_least(1)] = 1
    """Go on with no fewer hosts than N."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A checked command line."""

    config: LaunchConfig
    ssh: SshConfig
    supervision: SupervisionConfig
    reaping: ReapingConfig
    hosts: list[Host]
    """All hosts of the run."""
    environment: dict[str, str]
    """Variables of the ranks."""
    training: TrainingConfig
    train: list[str]
    """The options of the training as they were given."""
    folder: RunFolder

    @property
    def mark(self) -> str:
        """Of the job, see :data:`ten_dist.supervision.job.MARK`."""
        return str(self.folder.path.resolve())

    @property
    def logs(self) -> Path:
        """Folder with a folder of logs for each start."""
        return self.folder.logs.resolve()

    def master_address(self, hosts: list[Host]) -> str:
        """Address at which the ranks of a start on some of the hosts meet:
        --master_address as long as the host that has it takes part."""
        if self.config.master_address is not None and hosts[0] == self.hosts[0]:
            return self.config.master_address
        return resolve(hosts[0].address)[0]

"""Starting a training on several hosts again and again, on those that are there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from launch.cluster.config import Launch, tell
from launch.cluster.connection import Answer, clear_hosts
from launch.cluster.job import HostsJob
from launch.cluster.selection import micro_batch_option, select_hosts
from launch.cluster.start import HostsStart
from launch.hosts import Host, count_slots
from launch.preflight.check import check_hosts
from launch.preflight.settings import DEFAULT_PORT, PreflightSettings
from launch.remote import Remote
from ten_dist.errors import ConfigurationError

_SECONDS_BETWEEN_QUESTIONS = 5.0


class HostsJobs:
    """A training on several hosts as the job of a supervisor.

    `command` is for the log, and `preflight` has the hosts checked before the first start.
    """

    def __init__(
        self,
        launch: Launch,
        remote: Remote,
        command: Sequence[str],
        preflight: bool,
    ) -> None:
        self.command = list(command)
        self._launch, self._remote = launch, remote
        self._preflight = preflight
        self._taking_part = launch.hosts
        self._answers: list[Answer] | None = None

    def prepare(self, grace: float) -> list[str]:
        """End what is left on all hosts, and check them; see
        :meth:`ten_dist.supervision.job.Jobs.prepare`.

        Raises:
            ConfigurationError: something is wrong with a host.
        """
        answers, complaints = self._ask(grace)
        if self._preflight:
            self._check_hosts(answers)
        for host, complaint in complaints.items():
            raise ConfigurationError(
                f"host {host} {complaint}; set it right, or leave it out of the hosts"
            )
        self._answers = answers
        return [f"{len(a.ended)} processes on {a.host}" for a in answers if a.ended]

    def _check_hosts(self, answers: list[Answer]) -> None:
        """Have a preflight of all hosts; ConfigurationError after printing what is wrong."""
        launch, training = self._launch, self._launch.training
        ports = [a.port for a in answers if a.host == launch.hosts[0]]
        port = launch.config.master_port or next(iter(ports), DEFAULT_PORT)
        settings = PreflightSettings(
            data=training.data, output_dir=training.output_dir, master_port=port
        )
        report = check_hosts(
            launch.hosts, self._remote, settings, launch.environment, tell
        )
        if report.problems:
            tell(f"preflight\n{report.table()}")
        else:
            tell(f"all hosts are in order; {report.network_line()}")
        if report.errors:
            raise ConfigurationError(
                f"preflight has found {len(report.errors)} errors, see above: set them "
                "right, or leave it out with --no_preflight"
            )

    def start(self) -> HostsJob:
        """Start on the hosts that answer; see
        :meth:`ten_dist.supervision.job.Jobs.start`.

        Raises:
            ConfigurationError: too few hosts answer, or the batch divides over none.
        """
        chosen, free = self._chosen(self._answers)
        self._answers = None
        self._tell_changes(chosen, set(free))
        port = self._launch.config.master_port or free[chosen[0]]
        return HostsJob(self._plan(chosen, port), self._remote)

    def _plan(self, chosen: list[Host], port: int) -> HostsStart:
        training, folder = self._launch.training, self._launch.logs
        ranks, micro_batch = count_slots(chosen), training.micro_batch_size
        own = micro_batch_option(micro_batch, training.global_batch_size, ranks)
        if own:
            tell(
                f"{' '.join(own)} in place of {micro_batch}, which does not divide the "
                f"share of {ranks} ranks"
            )
        logs = folder / f"start_{next_number(folder):03d}"
        return HostsStart(
            launch=self._launch,
            hosts=chosen,
            master_port=port,
            logs=logs,
            hostfile=logs / "hostfile",
            environment=self._launch.environment,
            more=own,
        )

    def describe(self) -> list[str]:
        """What the first start would do, one line a fact."""
        hosts = self._launch.hosts
        start = self._plan(hosts, self._launch.config.master_port or 0)
        address = f"{start.master_address}:{start.master_port or 'PORT'}"
        return [
            *(
                f"{host}: ranks {', '.join(map(str, start.ranks_of(node)))}"
                for node, host in enumerate(hosts)
            ),
            f"master: {address}, a free port if none is given",
            "interface: that of each host on the way to the master",
            *(f"{name}={value}" for name, value in start.exports().items()),
            *(
                f"on {host}: {shlex.join(start.node_command(node))}"
                for node, host in enumerate(hosts)
            ),
        ]

    def _chosen(
        self, answers: list[Answer] | None
    ) -> tuple[list[Host], dict[Host, int]]:
        """The hosts of the next start, and a free port of each host that answers.

        Without `answers` the hosts are asked, until enough of them have answered.
        """
        launch = self._launch
        complaints: dict[Host, str] = {}
        deadline = time.monotonic() + launch.config.host_timeout
        while True:
            if answers is None:
                answers, complaints = self._ask(0.0)
            for host, complaint in complaints.items():
                tell(f"host {host} {complaint}")
            free = {answer.host: answer.port for answer in answers}
            batch, fewest = launch.training.global_batch_size, launch.config.min_hosts
            try:
                return select_hosts(list(free), batch, fewest), free
            except ConfigurationError:
                # The network between may be what is down.
                if not complaints or time.monotonic() >= deadline:
                    raise
            answers = None
            time.sleep(_SECONDS_BETWEEN_QUESTIONS)

    def _ask(self, grace: float) -> tuple[list[Answer], dict[Host, str]]:
        hosts, mark = self._launch.hosts, self._launch.mark
        master = self._launch.master_address(hosts)
        return clear_hosts(self._remote, hosts, mark, grace, master)

    def _tell_changes(self, chosen: list[Host], answering: Collection[Host]) -> None:
        hosts, ranks = self._launch.hosts, count_slots(chosen)
        for host in hosts:
            if host in answering and host not in chosen:
                tell(
                    f"host {host} is left out: --global_batch_size "
                    f"{self._launch.training.global_batch_size} divides over {ranks} "
                    "ranks, but not with its own"
                )
            if host in chosen and host not in self._taking_part:
                tell(f"host {host} takes part again")
        self._taking_part = chosen
        if len(chosen) < len(hosts):
            tell(
                f"{len(chosen)} of {len(hosts)} hosts, {ranks} ranks: "
                f"{', '.join(map(str, chosen))}"
            )


def next_number(logs: Path) -> int:
    """Number of the next start, from what earlier ones have left in the log folder."""
    found = [path.name.removeprefix("start_") for path in logs.glob("start_*")]
    return max((int(name) for name in found if name.isdecimal()), default=0) + 1

"""Starting a training on several hosts again and again, on those that are there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.cluster.clearing import Answer, clear_hosts
from launch.cluster.config import Launch
from launch.cluster.job import HostsJob
from launch.cluster.selection import micro_batch_option, select_hosts
from launch.cluster.start import HostsStart
from launch.hosts import Host
from launch.preflight.check import check_hosts
from launch.preflight.settings import DEFAULT_PORT, PreflightSettings
from launch.remote import Remote
from ten_dist.errors import ConfigurationError

_SECONDS_BETWEEN_QUESTIONS = 5.0


class HostsJobs:
    """A training on several hosts as the job of a supervisor.

    Args:
        launch: what to start and where.
        remote: how to reach the hosts.
        command: words of the whole, for the log.
        preflight: whether to check the hosts before the first start.
        tell: prints a line.
    """

    def __init__(
        self,
        launch: Launch,
        remote: Remote,
        command: Sequence[str],
        preflight: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.command = list(command)
        self._preflight = preflight
        self._launch, self._remote = launch, remote
        self._tell = tell
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
        return [
            f"{len(answer.ended)} processes on {answer.host}"
            for answer in answers
            if answer.ended
        ]

    def _check_hosts(self, answers: list[Answer]) -> None:
        """Have a preflight of all hosts.

        Raises:
            ConfigurationError: there are errors; the table of them has been printed.
        """
        launch, training = self._launch, self._launch.training
        ports = [a.port for a in answers if a.host == launch.hosts[0]]
        port = launch.config.master_port or next(iter(ports), DEFAULT_PORT)
        settings = PreflightSettings(
            data=training.data,
            output_dir=training.output_dir,
            master_port=port,
        )
        report = check_hosts(
            launch.hosts, self._remote, settings, launch.environment, self._tell
        )
        if report.problems:
            self._tell(f"preflight\n{report.table()}")
        else:
            self._tell(f"all hosts are in order; {report.network_line()}")
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
        answers = self._answers or self._answers_of_some()
        self._answers = None
        chosen = select_hosts(
            [answer.host for answer in answers],
            self._launch.training.global_batch_size,
            self._launch.config.min_hosts,
        )
        ranks = sum(host.slots for host in chosen)
        self._tell_changes(chosen, answers, ranks)
        free = {answer.host: answer.port for answer in answers}
        port = self._launch.config.master_port or free[chosen[0]]
        return HostsJob(
            self._plan(chosen, port),
            self._remote,
            self._launch.config.host_timeout,
            self._launch.supervision.keep_lines,
            self._tell,
        )

    def _plan(self, chosen: list[Host], port: int) -> HostsStart:
        batch = self._launch.training.global_batch_size
        ranks = sum(host.slots for host in chosen)
        own = micro_batch_option(self._launch.training.micro_batch_size, batch, ranks)
        if own:
            self._tell(
                f"{' '.join(own)} in place of {self._launch.training.micro_batch_size}, which "
                f"does not divide the share of {ranks} ranks"
            )
        logs = self._launch.logs / f"start_{next_number(self._launch.logs):03d}"
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
        start = self._plan(self._launch.hosts, self._launch.config.master_port or 0)
        port = start.master_port or "PORT"
        lines = [
            f"{host}: ranks {', '.join(map(str, start.ranks_of(node)))}"
            for node, host in enumerate(self._launch.hosts)
        ]
        lines.append(
            f"master: {start.master_address}:{port}, a free port if none is given"
        )
        lines.append("interface: that of each host on the way to the master")
        lines += [f"{name}={value}" for name, value in start.exports().items()]
        lines += [
            f"on {host}: {shlex.join(start.node_command(node))}"
            for node, host in enumerate(self._launch.hosts)
        ]
        return lines

    def _answers_of_some(self) -> list[Answer]:
        """Answers of the hosts that are there, as soon as they are enough."""
        deadline = time.monotonic() + self._launch.config.host_timeout
        while True:
            answers, complaints = self._ask(0.0)
            for host, complaint in complaints.items():
                self._tell(f"host {host} {complaint}")
            try:
                select_hosts(
                    [answer.host for answer in answers],
                    self._launch.training.global_batch_size,
                    self._launch.config.min_hosts,
                )
            except ConfigurationError:
                # The network between may be what is down.
                if not complaints or time.monotonic() >= deadline:
                    raise
            else:
                return answers
            time.sleep(_SECONDS_BETWEEN_QUESTIONS)

    def _ask(self, grace: float) -> tuple[list[Answer], dict[Host, str]]:
        master = self._launch.master_address(self._launch.hosts)
        return clear_hosts(
            self._remote, self._launch.hosts, self._launch.mark, grace, master
        )

    def _tell_changes(
        self, chosen: list[Host], answers: list[Answer], ranks: int
    ) -> None:
        answering = {answer.host for answer in answers}
        for host in self._launch.hosts:
            if host in answering and host not in chosen:
                self._tell(
                    f"host {host} is left out: --global_batch_size "
                    f"{self._launch.training.global_batch_size} divides over {ranks} ranks, "
                    "but not with its own"
                )
            if host in chosen and host not in self._taking_part:
                self._tell(f"host {host} takes part again")
        self._taking_part = chosen
        if len(chosen) < len(self._launch.hosts):
            self._tell(
                f"{len(chosen)} of {len(self._launch.hosts)} hosts, {ranks} ranks: "
                f"{', '.join(map(str, chosen))}"
            )


def next_number(logs: Path) -> int:
    """Number of the next start, from what earlier ones have left in the log folder."""
    found = [path.name.removeprefix("start_") for path in logs.glob("start_*")]
    return max((int(name) for name in found if name.isdecimal()), default=0) + 1

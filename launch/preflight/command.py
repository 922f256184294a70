"""Is everything right on the hosts of a run, before it costs anything?

ten-dist preflight --hostfile hostfile --data DATA --output_dir RUN

Over ssh, on all hosts at once: can they be reached, do clocks, Python, code and packages
agree, are GPUs there and well, is there room, is the data the same, do the hosts share the
output folder, can each reach every other, and how fast is an all-reduce between them. A
table shows the hosts and every problem with its cure. Nothing stays on the hosts, and every
step has a time limit.

Exit status: 0 a run can begin, perhaps with warnings; 2 there are errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.hosts import Host, parse_hosts, read_hostfile, slurm_hosts
from launch.hosts import check_names as check_own_names
from launch.preflight.all_reduce import measure, rank_counts
from launch.preflight.connections import connect
from launch.preflight.findings import ERROR, NetworkMeasurement, Problem
from launch.preflight.gathering import ROOT, gather_reports
from launch.preflight.gpus import check_gpus, chosen_backend
from launch.preflight.machine import (
    check_clock,
    check_data,
    check_disks,
    check_sections,
)
from launch.preflight.network import (
    check_interfaces,
    check_master_port,
    check_names,
    private_interfaces,
)
from launch.preflight.report import PreflightReport
from launch.preflight.settings import PreflightSettings
from launch.preflight.software import check_code, check_packages, check_python
from launch.remote import Remote, SshConfig
from ten_dist.config.command_line import add_options, given_options
from ten_dist.console import say
from ten_dist.errors import EXIT_CONFIGURATION_ERROR, ConfigurationError
from ten_dist.files import unwritable, write_json

_OPTIONS = {f.name for f in dataclasses.fields(PreflightSettings)} - {"network_test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist preflight`."""
    hosts = parser.add_argument_group("hosts")
    hosts.add_argument(
        "--hostfile",
        metavar="FILE",
        help="a line `ADDRESS slots=GPUS` for each host; without it and --hosts, the "
        "hosts of the Slurm allocation",
    )
    hosts.add_argument(
        "--hosts", metavar="A:N,B:N", help="addresses and slots, in place of a hostfile"
    )
    add_options(hosts, SshConfig)
    checks = parser.add_argument_group("checks")
    add_options(checks, PreflightSettings, only=_OPTIONS)
    checks.add_argument(
        "--no_network_test",
        dest="network_test",
        action="store_false",
        default=argparse.SUPPRESS,
        help="do not measure an all-reduce across the hosts",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that was found into it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the hosts and print the table.

    Returns:
        The exit status, see above.

    Raises:
        ConfigurationError: an option is wrong, or the list of hosts.
    """
    hosts = _listed(arguments)
    if arguments.json is not None:
        reason = unwritable(Path(arguments.json).absolute().parent)
        if reason is not None:
            raise ConfigurationError(f"--json {arguments.json}: its folder {reason}")
    settings = PreflightSettings(**given_options(arguments, PreflightSettings))
    remote = Remote(SshConfig(**given_options(arguments, SshConfig)))
    report = check_hosts(hosts, remote, settings, say)
    say(report.table())
    if arguments.json is not None:
        write_json(Path(arguments.json), report.to_dict())
    return EXIT_CONFIGURATION_ERROR if report.errors else 0


def _listed(arguments: argparse.Namespace) -> list[Host]:
    """The hosts that the options name, or those of the Slurm allocation."""
    if arguments.hostfile is not None and arguments.hosts is not None:
        raise ConfigurationError("--hostfile and --hosts both name the hosts: keep one")
    if arguments.hostfile is not None:
        return read_hostfile(Path(arguments.hostfile))
    if arguments.hosts is not None:
        return parse_hosts(arguments.hosts)
    if "SLURM_JOB_NODELIST" in os.environ:
        return slurm_hosts()
    raise ConfigurationError(
        "give --hostfile FILE or --hosts A:N,B:N, or start inside a Slurm allocation"
    )


def check_hosts(
    hosts: Sequence[Host],
    remote: Remote,
    settings: PreflightSettings,
    tell: Callable[[str], None] = lambda line: None,
) -> PreflightReport:
    """Find out whether a run can begin on some hosts.

    Args:
        hosts: the hosts, the one with the master first.
        remote: how to reach them.
        settings: what to check.
        tell: is given a line before each step that takes a while.

    Raises:
        ConfigurationError: the names of the hosts cannot be used at all, or an option is
            wrong.
    """
    check_own_names(hosts)
    tell(f"looking at {len(hosts)} hosts")
    reports, problems = gather_reports(hosts, remote, settings)
    interfaces, addresses, unusable = private_interfaces(reports, settings)
    backend = chosen_backend(reports, settings.backend)
    problems += [
        *check_sections(reports),
        *unusable,
        *check_clock(reports, settings),
        *check_python(reports),
        *check_code(reports, str(ROOT)),
        *check_packages(reports),
        *check_gpus(reports, backend),
        *check_disks(reports, settings),
        *check_data(reports, settings),
        *check_interfaces(reports, interfaces, addresses),
        *check_names(reports, interfaces),
        *check_master_port(reports, settings),
    ]
    shared = None
    meeting = [report for report in reports if report.host in addresses]
    if len(meeting) > 1:
        tell("connecting each host with every other")
        shared, found = connect(meeting, addresses, remote, settings)
        problems += found
    measurement: NetworkMeasurement | None = None
    reason = _reason_not_to_measure(hosts, problems, backend, settings)
    if reason == "":
        tell(f"reducing over {backend}")
        measurement, found = measure(
            hosts, remote, settings, backend, interfaces, addresses[hosts[0]]
        )
        problems += found
        reason = "it failed" if found else ""
    return PreflightReport(
        hosts=hosts,
        reports=reports,
        problems=problems,
        backend=backend,
        interfaces=interfaces,
        addresses=addresses,
        measurement=measurement,
        no_measurement=reason,
        shared_output=shared,
    )


def _reason_not_to_measure(
    hosts: Sequence[Host],
    problems: Sequence[Problem],
    backend: str,
    settings: PreflightSettings,
) -> str:
    """Why no all-reduce is tried; "" where it is."""
    if not settings.network_test:
        return "as --no_network_test asks"
    if any(problem.severity == ERROR for problem in problems):
        return "as there are errors"
    if sum(rank_counts(hosts, backend)) < 2:
        return "as one rank has nobody to talk to"
    return ""

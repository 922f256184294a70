"""All checks of hosts before a run, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launch.hosts import Host
from launch.preflight.all_reduce import measure, rank_counts
from launch.preflight.connections import connect
from launch.preflight.findings import ERROR, NetworkMeasurement, Problem
from launch.preflight.gathering import ROOT, gather_reports
from launch.preflight.gpus import check_gpus, chosen_backend
from launch.preflight.machine import (
    check_clock,
    check_code,
    check_data,
    check_disks,
    check_packages,
    check_python,
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
from launch.rank_environment import with_interface
from launch.remote import Remote


def check_hosts(
    hosts: Sequence[Host],
    remote: Remote,
    settings: PreflightSettings,
    environment: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
) -> PreflightReport:
    """Check whether a run can begin on some hosts, of which the first has the master.

    `environment` has the variables of the ranks, see :mod:`launch.rank_environment`, and
    `tell` is given a line before each step that takes seconds.

    Raises:
        ConfigurationError: an option is wrong.
    """
    tell(f"looking at {len(hosts)} hosts")
    reports, problems = gather_reports(hosts, remote, settings)
    interfaces, addresses, unusable = private_interfaces(reports, settings)
    backend = chosen_backend(reports, settings.backend, environment)
    problems += [
        *unusable,
        *check_sections(reports),
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
        variables = {h: with_interface(environment, interfaces[h]) for h in hosts}
        measurement, found = measure(
            hosts, remote, settings, backend, variables, addresses[hosts[0]]
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

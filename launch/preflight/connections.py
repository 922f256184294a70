"""Connections between all hosts, and whether they share the output folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from launch.hosts import Host
from launch.preflight.findings import HostReport, Problem
from launch.preflight.gathering import lines_of, run_script, unreachable
from launch.preflight.settings import PreflightSettings
from launch.remote import SSH_FAILED, Remote

_SECONDS = 10
"""Time that the hosts have to meet; those that can need a fraction of a second."""


def connect(
    reports: Sequence[HostReport],
    addresses: Mapping[Host, str],
    remote: Remote,
    settings: PreflightSettings,
) -> tuple[bool | None, list[Problem]]:
    """Have every host connect to every other, and look for a file of the first one.

    Returns:
        Whether all see the same output folder, None where that is unknown; and problems.
    """
    token = secrets.token_hex(8)
    hosts = [report.host for report in reports]
    output = reports[0].section("output")
    writable = output is not None and output["problem"] is None
    peers = [
        {"address": addresses[r.host], "port": r.facts["network"]["meeting_port"]}
        for r in reports
    ]

    def meet(host: Host) -> tuple[bool | None, list[Problem]]:
        wanted = {
            "me": hosts.index(host),
            "peers": peers,
            "folder": output["existing"] if writable else None,
            "token": token,
            "seconds": _SECONDS,
        }
        outcome = run_script(remote, host, settings.python, "meeting.py", wanted)
        found = lines_of(outcome.output)
        if outcome.status == SSH_FAILED:
            return None, [unreachable(outcome)]
        if "unreached" not in found:
            what = f"it could not meet the others: {outcome.complaint()}"
            return None, [Problem(host, what, f"look at `ssh {host}` by hand")]
        cure = "open all TCP ports between the hosts on that network, in both firewalls"
        problems = []
        for number, reason in found["unreached"].items():
            peer = peers[int(number)]
            where = f"{hosts[int(number)]} at {peer['address']} port {peer['port']}"
            problems.append(Problem(host, f"it cannot reach {where}: {reason}", cure))
        return found["shared"], problems

    results = remote.on_all(hosts, meet)
    problems = [problem for _, found in results for problem in found]
    seen = [shared for shared, _ in results[1:]]
    for report, shared in zip(reports[1:], seen):
        if shared is False:
            problem = report.problem(
                f"--output_dir {settings.output_path()} is not the folder that "
                f"{hosts[0]} has under that name",
                "put it on a file system that all hosts share: every rank writes its "
                "part of a checkpoint there",
            )
            problems.append(problem)
    if False in seen:
        return False, problems
    return (None if None in seen else True), problems

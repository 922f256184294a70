"""Reports of all hosts, over ssh, and what stood in the way of those that gave none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launch
from launch.hosts import Host
from launch.preflight.findings import HostReport, Problem
from launch.preflight.settings import PreflightSettings
from launch.remote import SSH_FAILED, Outcome, Remote

ROOT = Path(launch.__file__).resolve().parents[1]
"""The checkout, which lies at the same path on every host."""
_FOLDER = Path(__file__).parent
_SSH_FAULTS = (
    (
        "Connection refused",
        "its ssh server refuses connections",
        "start sshd there, or give its port with --ssh_port",
    ),
    (
        "Permission denied",
        "ssh does not let us in: it does not know our key",
        "ssh-copy-id {host}, or say who to be there with --ssh_user",
    ),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed",
        "ssh does not know its host key, or knows another",
        "check that it is the right machine, then `ssh-keygen -R {host}; ssh {host}`",
    ),
    (
        "timed out|No route to host|Network is unreachable",
        "ssh gets no answer from it: {complaint}",
        "is it running, its address right, its link up, and its ssh port open to us?",
    ),
    (
        "Could not resolve hostname",
        "ssh does not know its name",
        "correct it, or give its address",
    ),
    ("", "ssh fails: {complaint}", "`ssh {host} true` must work without any question"),
)
"""What ssh says, as a regular expression, what that means, and the cure."""


def gather_reports(
    hosts: Sequence[Host], remote: Remote, settings: PreflightSettings
) -> tuple[list[HostReport], list[Problem]]:
    """Ask all hosts at once what they are and have: reports, and a problem for each host
    that gives none.

    Raises:
        ConfigurationError: `settings.data` is not what `ten-dist train` takes.
    """
    output, data = settings.output_path(), settings.data_addresses()

    def ask(host: Host) -> HostReport | Problem:
        wanted = {
            "root": str(ROOT),
            "names": sorted({host.address for host in hosts}),
            "master_port": settings.master_port if host == hosts[0] else None,
            "output_dir": None if output is None else str(output),
            "data": data,
            "seconds": settings.report_timeout,
        }
        start = time.time()
        outcome = run_script(remote, host, settings.python, "probe.py", wanted)
        end = time.time()
        facts = lines_of(outcome.output)
        if outcome.status != 0 or "ended" not in facts:
            return _no_report(outcome, facts, settings)
        # It began after `start` and ended before `end`, or its clock is off.
        least, most = facts["ended"] - end, facts["started"] - start
        offset = least if least > 0 else min(most, 0.0)
        return HostReport(host, facts, offset)

    answers = remote.on_all(hosts, ask)
    return (
        [answer for answer in answers if isinstance(answer, HostReport)],
        [answer for answer in answers if isinstance(answer, Problem)],
    )


def run_script(
    remote: Remote, host: Host, python: str, name: str, wanted: dict[str, Any]
) -> Outcome:
    """Run a file of this folder, with an argument in JSON, on a host that may not have it.

    `wanted` has the key `seconds`, after which the script ends by itself.
    """
    words = ["env", python, "-", json.dumps(wanted)]
    # ssh has its own time to connect.
    timeout = wanted["seconds"] + remote.ssh.connect_timeout + 5
    source = (_FOLDER / name).read_bytes()
    return remote.run(host, words, timeout=timeout, stdin=source)


def lines_of(output: str) -> dict[str, Any]:
    """The objects of the lines of an output, joined; other lines are passed over."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        # Login scripts may print.
        if line.startswith("{"):
            try:
                found.update(json.loads(line))
            except ValueError:
                continue
    return found


def _no_report(
    outcome: Outcome, facts: dict[str, Any], settings: PreflightSettings
) -> Problem:
    """Why a host gave no report."""
    host, python, complaint = outcome.host, settings.python, outcome.complaint()
    if outcome.status == SSH_FAILED:
        return unreachable(outcome)
    if outcome.status == 127:
        what = f"it has no {python}"
        cure = f"run launch/environment.sh there, in {ROOT}, or give --python"
    elif "begin" in facts:
        what = f"its report did not get beyond `{facts['begin']}`: {complaint}"
        cure = (
            f"is a file system or device of it stuck? `ssh {host} dmesg` may tell; "
            "--report_timeout gives it more time"
        )
    else:
        what = f"it gave no report: {complaint}"
        cure = f"try `ssh {host} {python} -V`, which must answer at once"
    return Problem(host, what, cure)


def unreachable(outcome: Outcome) -> Problem:
    """The problem of a host that ssh did not reach, or lost."""
    what, cure = next(
        (what.format(complaint=outcome.complaint()), cure.format(host=outcome.host))
        for pattern, what, cure in _SSH_FAULTS
        if re.search(pattern, outcome.errors)
    )
    return Problem(outcome.host, what, cure)

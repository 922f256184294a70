"""An all-reduce across the hosts, as training does it, with its latency and bandwidth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from launch.hosts import Host
from launch.preflight.findings import NetworkMeasurement, Problem
from launch.preflight.gathering import lines_of, unreachable
from launch.preflight.settings import PreflightSettings
from launch.remote import SSH_FAILED, Outcome, Remote, opened, text_of

_WORKER = Path(__file__).with_name("all_reduce_worker.py")
_GRACE = 3.0
"""Seconds for the other ranks to fail by themselves, and say why, once one has failed."""


@dataclasses.dataclass
class _Rank:
    """A rank that was started."""

    host: Host
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]

    def said(self) -> dict[str, Any]:
        """What it has printed so far."""
        return lines_of(text_of(self.output))


def rank_counts(hosts: Sequence[Host], backend: str) -> list[int]:
    """Ranks of the all-reduce on each host: one, or with nccl one for each GPU."""
    return [host.slots if backend == "nccl" else 1 for host in hosts]


def measure(
    hosts: Sequence[Host],
    remote: Remote,
    settings: PreflightSettings,
    backend: str,
    variables: Mapping[Host, Mapping[str, str]],
    master_address: str,
) -> tuple[NetworkMeasurement | None, list[Problem]]:
    """Run it, in `settings.network_timeout` seconds: what was measured, or what went wrong.

    The master, at `master_address`, is the first of the hosts, and `variables` has the
    environment variables of the ranks on each host. No process of it is left on any.
    """
    counts = rank_counts(hosts, backend)
    wanted = {
        "backend": backend,
        "size": sum(counts),
        "address": master_address,
        "port": settings.master_port,
        "seconds": settings.network_timeout,
    }
    deadline = time.monotonic() + settings.network_timeout
    ranks: list[_Rank] = []
    with contextlib.ExitStack() as files:
        files.callback(_end, ranks)
        for host, count in zip(hosts, counts):
            words = ["env", *(f"{k}={v}" for k, v in variables[host].items())]
            words += [settings.python, str(_WORKER)]
            for local_rank in range(count):
                own = wanted | {"rank": len(ranks), "local_rank": local_rank}
                output = files.enter_context(tempfile.TemporaryFile())
                errors = files.enter_context(tempfile.TemporaryFile())
                command = [*words, json.dumps(own)]
                process = remote.start(host, command, stdout=output, stderr=errors)
                ranks.append(_Rank(host, process, output, errors))
        late = _wait(ranks, deadline)
        problems = _problems(ranks, late, settings)
        if problems:
            return None, problems
        found = ranks[0].said()["measured"]
        return NetworkMeasurement(backend=backend, ranks=len(ranks), **found), []


def _end(ranks: Sequence[_Rank]) -> None:
    """End all ranks, on their hosts too, where they end with their input."""
    for rank in ranks:
        opened(rank.process.stdin).close()
    patience = time.monotonic() + 5
    for rank in ranks:
        try:
            rank.process.wait(max(patience - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def _wait(ranks: Sequence[_Rank], deadline: float) -> bool:
    """Wait until all have ended, one has failed, or the time is up, which is returned."""
    failed = False
    while time.monotonic() < deadline:
        states = [rank.process.poll() for rank in ranks]
        if None not in states:
            return False
        if any(states) and not failed:
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return not failed


def _problems(
    ranks: Sequence[_Rank], late: bool, settings: PreflightSettings
) -> list[Problem]:
    """What went wrong; one for each host at most."""
    found: dict[Host, Problem] = {}
    for rank in ranks:
        status = rank.process.poll()
        outcome = Outcome(rank.host, status, "", text_of(rank.errors))
        stage = rank.said().get("stage", "starting Python")
        if status == SSH_FAILED:
            found.setdefault(rank.host, unreachable(outcome))
            continue
        if status is None and late:
            limit = settings.network_timeout
            what = f"the all-reduce did not end in {limit} s: it is still {stage}"
        elif status:
            what = f"the all-reduce failed while {stage}: {outcome.complaint()[:300]}"
        else:
            continue
        found.setdefault(rank.host, Problem(rank.host, what, _cure(stage)))
    return list(found.values())


def _cure(stage: str) -> str:
    if "torch" in stage or "Python" in stage:
        return (
            "`python -c 'import torch'` must work there, in less time; "
            "--network_timeout gives it more"
        )
    if "MiB" in stage:
        return (
            "the hosts talk, but large packets get lost or the link is very slow: "
            "compare MTUs with that of the network (`ping -M do -s 1472 HOST`)"
        )
    return (
        "open all TCP ports between the hosts on that network; where GLOO_SOCKET_IFNAME "
        "or NCCL_SOCKET_IFNAME is set, correct it; NCCL_DEBUG=INFO has NCCL tell more"
    )

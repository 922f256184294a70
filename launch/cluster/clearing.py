"""Ending the processes that earlier starts have left on the hosts, and asking for a free port."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from launch.hosts import Host
from launch.remote import Outcome, Remote, with_environment
from ten_dist.errors import ConfigurationError, TrainingError

AGENT = [sys.executable, "-m", "launch.cluster.agent"]
"""Command of an agent: the same checkout and environment are on every host."""
_SECONDS_FOR_SIGKILL = 30.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a host has reported."""

    host: Host
    ended: list[str]
    """What was left of earlier starts and had to be ended."""
    port: int
    """A free port."""


def clear_hosts(
    remote: Remote, hosts: Sequence[Host], mark: str, grace: float, master: str
) -> tuple[list[Answer], dict[Host, str]]:
    """End what is left of a job on hosts, all at once.

    Args:
        remote: how to reach them.
        hosts: which ones.
        mark: of the job, see :data:`ten_dist.supervision.job.MARK`.
        grace: seconds between SIGTERM and SIGKILL.
        master: address of the first host.

    Returns:
        Answers of the hosts that can take part, and what is wrong with the others, to be
        read after `host X`.

    Raises:
        TrainingError: a process of the job cannot be killed.
    """
    request = {"do": "clear", "mark": mark, "grace": grace, "master": master}
    outcomes = remote.run_on_all(
        hosts,
        with_environment(AGENT, {}),
        timeout=remote.ssh.connect_timeout + grace + _SECONDS_FOR_SIGKILL,
        stdin=json.dumps(request).encode() + b"\n",
    )
    answers, complaints = [], {}
    for outcome in outcomes:
        try:
            answers.append(_answer(outcome))
        except ConfigurationError as error:
            complaints[outcome.host] = str(error)
    return answers, complaints


def _answer(outcome: Outcome) -> Answer:
    """Read what an agent has said.

    Raises:
        ConfigurationError: the host cannot take part; the message goes on after its name.
        TrainingError: processes of an earlier start cannot be ended there.
    """
    if outcome.unreachable:
        raise ConfigurationError(f"does not answer: {outcome.complaint()}")
    try:
        said = json.loads(outcome.output.splitlines()[-1])
    except (ValueError, IndexError):
        raise ConfigurationError(
            f"cannot run {' '.join(AGENT)} ({outcome.complaint()}): the checkout and "
            "its environment must be at the same path on every host"
        ) from None
    if "error" in said:
        if said["refused"]:
            raise ConfigurationError(f"cannot take part: {said['error']}")
        raise TrainingError(f"host {outcome.host}: {said['error']}")
    return Answer(outcome.host, said["ended"], said["port"])

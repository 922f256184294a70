"""The launcher's end of its conversations with the agents of hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from launch.cluster.agent import ALIVE_SECONDS
from launch.hosts import Host
from launch.remote import Outcome, Remote, opened, text_of
from ten_dist.errors import TrainingError

# The same checkout and environment are on every host, at the same path.
_AGENT = [sys.executable, "-m", "launch.cluster.agent"]
_SECONDS_FOR_SIGKILL = 30.0
_LONG_SILENCE_SECONDS = 3 * ALIVE_SECONDS


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a host that can take part has reported."""

    host: Host
    ended: list[str]
    """What was left of earlier starts and had to be ended."""
    port: int
    """A free port."""


def clear_hosts(
    remote: Remote, hosts: Sequence[Host], mark: str, grace: float, master: str
) -> tuple[list[Answer], dict[Host, str]]:
    """End what earlier starts of a job have left on hosts, and ask for a free port of each.

    Args:
        remote: reaches the hosts.
        hosts: the hosts, at once.
        mark: of the job, see :data:`ten_dist.supervision.job.MARK`.
        grace: seconds between SIGTERM and SIGKILL.
        master: address that the hosts need a route to.

    Returns:
        Answers of the hosts that can take part, and what is wrong with the others, to be
        read after `host X`.

    Raises:
        TrainingError: a process of the job cannot be killed.
    """
    request = {"do": "clear", "mark": mark, "grace": grace, "master": master}
    outcomes = remote.run_on_all(
        hosts,
        ["env", "--chdir", os.getcwd(), *_AGENT],
        timeout=remote.ssh.connect_timeout + grace + _SECONDS_FOR_SIGKILL,
        stdin=json.dumps(request).encode() + b"\n",
    )
    answers, complaints = [], {}
    for outcome in outcomes:
        found = _answer(outcome)
        if isinstance(found, Answer):
            answers.append(found)
        else:
            complaints[outcome.host] = found
    return answers, complaints


def _answer(outcome: Outcome) -> Answer | str:
    """What an agent has said, or why its host cannot take part, to be read after its name.

    Raises:
        TrainingError: processes of an earlier start cannot be ended there.
    """
    if outcome.unreachable:
        return f"does not answer: {outcome.complaint()}"
    try:
        said = json.loads(outcome.output.splitlines()[-1])
    except (ValueError, IndexError):
        return (
            f"cannot run {' '.join(_AGENT)} ({outcome.complaint()}): the checkout and "
            "its environment must be at the same path on every host"
        )
    if "error" not in said:
        return Answer(outcome.host, said["ended"], said["port"])
    if said["refused"]:
        return f"cannot take part: {said['error']}"
    raise TrainingError(f"host {outcome.host}: {said['error']}")


class Connection:
    """Starts an agent on a host with a first request, and keeps what it says.

    Attributes:
        host: the host.
        status: exit status of the command that starts its ranks; None before.
        ended_ranks: ranks that have ended, in the order of their ends.
        gone: what had to be ended, once it has been told to end; None before.
        error: what it refuses or cannot do, and whether it refuses, or None.
        closed: whether it says no more.
    """

    def __init__(self, remote: Remote, host: Host, request: dict[str, Any]) -> None:
        self.host = host
        self.status: int | None = None
        self.ended_ranks: list[int] = []
        self.gone: list[str] | None = None
        self.error: tuple[str, bool] | None = None
        self.closed = False
        self._heard = self._told = time.monotonic()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        command = ["env", "--chdir", os.getcwd(), *_AGENT]
        self._process = remote.start(host, command, stderr=self._errors)
        self._input = opened(self._process.stdin)
        self._output = opened(self._process.stdout)
        self.tell(**request)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, **request: Any) -> None:
        """Send a request; one that no longer arrives is of no use any more."""
        self._told = time.monotonic()
        with contextlib.suppress(OSError):
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()

    def keep_alive(self) -> None:
        """Say every few seconds that the launcher is there."""
        if time.monotonic() - self._told >= ALIVE_SECONDS:
            self.tell(do="alive")

    def lost(self, patience: float) -> str | None:
        """Why the host, silent for `patience` seconds or more, counts as lost, or None."""
        if self.gone is not None or self.error is not None:
            return None
        silence = time.monotonic() - self._heard
        if silence >= min(patience, _LONG_SILENCE_SECONDS):
            # ssh itself may have given it up before.
            given_up = self.closed or silence >= patience
            return f"no word for {silence:.0f} s" if given_up else None
        if not self.closed:
            return None
        errors = text_of(self._errors)
        ending = Outcome(self.host, self._process.poll(), "", errors).complaint()
        return f"its connection ended ({ending})"

    def close(self) -> None:
        """End the connection; the agent ends what it has not been told to end."""
        self._process.kill()
        self._process.wait()
        self._reader.join(5.0)
        for stream in (self._input, self._output, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def _read(self) -> None:
        for line in self._output:
            self._heard = time.monotonic()
            try:
                event = json.loads(line)
            except ValueError:
                # A greeting of the host's shell.
                continue
            self.status = event.get("status", self.status)
            self.ended_ranks = event.get("ended_ranks", self.ended_ranks)
            self.gone = event.get("gone", self.gone)
            if "error" in event:
                self.error = event["error"], event["refused"]
        self.closed = True

"""The launcher's end of a conversation with the agent of a host."""

from __future__ import annotations

import collections
import contextlib
import json
import subprocess
import threading
import time
from typing import Any

from launch.cluster.agent import ALIVE_SECONDS
from launch.cluster.clearing import AGENT
from launch.hosts import Host
from launch.remote import Remote, opened, with_environment

_KEEP_LINES = 20
_LONG_SILENCE_SECONDS = 3 * ALIVE_SECONDS


class Connection:
    """Starts an agent on a host and keeps what it says.

    Args:
        remote: how to reach hosts.
        host: which one.
        request: the first request, see :mod:`launch.cluster.agent`.

    Attributes:
        host: the host.
        status: exit status of the command that starts its ranks; None before.
        ended_ranks: ranks that have ended, in their order.
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
        self._heard = time.monotonic()
        self._told = self._heard
        self._errors: collections.deque[str] = collections.deque(maxlen=_KEEP_LINES)
        # A session of its own: Ctrl-C is for the launcher, which has the ranks save.
        self._process = remote.start(
            host,
            with_environment(AGENT, {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._input = opened(self._process.stdin)
        self._output = opened(self._process.stdout)
        self._complaints = opened(self._process.stderr)
        self.tell(**request)
        self._readers = [
            threading.Thread(target=read, daemon=True)
            for read in (self._read_events, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def tell(self, **request: Any) -> None:
        """Send a request; one that no longer arrives is of no use any more."""
        self._told = time.monotonic()
        with contextlib.suppress(OSError):
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()

    def keep_alive(self) -> None:
        """Say now and then that the launcher is there."""
        if time.monotonic() - self._told >= ALIVE_SECONDS:
            self.tell(do="alive")

    def lost(self, patience: float) -> str | None:
        """Why the host counts as lost, or None.

        Args:
            patience: seconds that it may be silent.
        """
        if self.gone is not None or self.error is not None:
            return None
        silence = time.monotonic() - self._heard
        if silence >= min(patience, _LONG_SILENCE_SECONDS):
            # ssh itself may have given it up before.
            given_up = self.closed or silence >= patience
            return f"no word for {silence:.0f} s" if given_up else None
        if not self.closed:
            return None
        words = " ".join(list(self._errors)[-1:]) or f"status {self._process.poll()}"
        return f"its connection ended ({words})"

    def close(self) -> None:
        """End the connection; the agent ends what it has not been told to end."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(5.0)
        for stream in (self._input, self._output, self._complaints):
            with contextlib.suppress(OSError):
                stream.close()

    def _read_events(self) -> None:
        for line in self._output:
            self._heard = time.monotonic()
            try:
                event = json.loads(line)
            except ValueError:
                # A greeting of the host's shell.
                continue
            if "status" in event:
                self.status = event["status"]
            if "ended_ranks" in event:
                self.ended_ranks = event["ended_ranks"]
            if "gone" in event:
                self.gone = event["gone"]
            if "error" in event:
                self.error = event["error"], event["refused"]
        self.closed = True

    def _read_errors(self) -> None:
        for line in self._complaints:
            text = line.decode(errors="replace").strip()
            if text:
                self._errors.append(text)

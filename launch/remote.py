"""Commands on the hosts of a run, over ssh; on this machine without it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, TypeVar

from launch.hosts import Host, is_own, own_addresses
from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import PORT, Options, at_least, metavar
from ten_dist.errors import ConfigurationError

_Result = TypeVar("_Result")

SSH_FAILED = 255
"""Status of ssh itself where it did not reach the host, or lost it."""
# A host that does not answer for 10 + 3 x 10 s has gone, and so does the command; a link
# that is down for 20 s is ridden out.
_ALIVE = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SshConfig(Options):
    """How ssh reaches the hosts; each field is an option of the commands that do."""

    GROUP: ClassVar[str] = "ssh"

    ssh_config: Annotated[str | None, metavar("FILE")] = None
    """Configuration file for ssh, in place of ~/.ssh/config."""
    ssh_port: Annotated[int | None, PORT] = None
    """Port of the hosts' ssh servers."""
    ssh_user: str | None = None
    """User to log in as on the hosts."""
    connect_timeout: Annotated[int, at_least(1, most=LONGEST_SECONDS)] = 10
    """Seconds to wait for a host's ssh server."""

    def check_together(self) -> None:
        if self.ssh_config is not None and not Path(self.ssh_config).is_file():
            raise ConfigurationError(f"--ssh_config {self.ssh_config} is not a file")

    def options(self) -> list[str]:
        """Words between `ssh` and the host. Nothing is ever asked of the terminal."""
        words = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={self.connect_timeout}"]
        words += _ALIVE
        config = self.ssh_config and Path(self.ssh_config).resolve()
        given = {"-F": config, "-p": self.ssh_port, "-l": self.ssh_user}
        for option, value in given.items():
            words += [] if value is None else [option, str(value)]
        return words


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command on a host ended."""

    host: Host
    status: int | None
    """Exit status, -N after signal N; None where it took too long and was given up."""
    output: str
    errors: str

    @property
    def unreachable(self) -> bool:
        """Whether the command may not have run at all."""
        return self.status in (None, SSH_FAILED)

    def complaint(self) -> str:
        """The last line that it printed to its error output, or how it ended."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        if lines:
            return lines[-1].strip()
        return "no answer" if self.status is None else f"status {self.status}"


class Remote:
    """Runs commands on hosts.

    The host keys of new machines, whose addresses others may have had before, are taken
    and kept in the file `new_host_keys`, in place of those that the user knows.

    Raises:
        ConfigurationError: there is no ssh here.
    """

    def __init__(self, ssh: SshConfig, new_host_keys: str | None = None) -> None:
        if shutil.which("ssh") is None:
            raise ConfigurationError(
                "there is no ssh on this machine: install its client (Debian: "
                "openssh-client)"
            )
        self.ssh = ssh
        self._options = ssh.options()
        if new_host_keys is not None:
            known = f"UserKnownHostsFile={new_host_keys}"
            accept = ["-o", "StrictHostKeyChecking=accept-new", "-o", known]
            self._options = [*accept, *self._options]
        self._own = own_addresses()
        self._waited_for: set[subprocess.Popen[bytes]] = set()

    def start(
        self,
        host: Host,
        words: Sequence[str],
        *,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, with a pipe for its input.

        When ssh ends, its command goes on: whoever starts one has to end it.
        """
        command = list(words)
        if not is_own(host, self._own):
            command = ["ssh", *self._options, host.address, shlex.join(words)]
        # A session of its own: Ctrl-C is for the caller, who may have to clean up.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def run(
        self, host: Host, words: Sequence[str], *, timeout: float, stdin: bytes = b""
    ) -> Outcome:
        """Run a command on a host and wait for its end, for `timeout` seconds at most.

        What still runs on another host after that is left to itself.
        """
        process = self.start(host, words)
        self._waited_for.add(process)
        try:
            output, errors = process.communicate(stdin, timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            _kill(process)
            try:
                output, errors = process.communicate(timeout=5)
            except subprocess.TimeoutExpired as stuck:
                output, errors = stuck.output or b"", stuck.stderr or b""
            status = None
        finally:
            self._waited_for.discard(process)
        texts = [stream.decode(errors="replace") for stream in (output, errors)]
        return Outcome(host, status, *texts)

    def run_on_all(
        self, hosts: Sequence[Host], words: Sequence[str], **options: Any
    ) -> list[Outcome]:
        """As :meth:`run` on all hosts at once; the outcomes in their order."""
        return self.on_all(hosts, lambda host: self.run(host, words, **options))

    def on_all(
        self, hosts: Sequence[Host], action: Callable[[Host], _Result]
    ) -> list[_Result]:
        """Do something with all hosts at once; the results in their order.

        What :meth:`run` waits for is given up when this is interrupted.
        """
        if not hosts:
            return []
        with concurrent.futures.ThreadPoolExecutor(min(len(hosts), 128)) as pool:
            try:
                return list(pool.map(action, hosts))
            except BaseException:
                # The threads have to end first, which they would in their own time.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(self._waited_for):
                    _kill(process)
                raise


def opened(pipe: IO[bytes] | None) -> IO[bytes]:
    """A stream of a process that was started with a pipe for it."""
    assert pipe is not None
    return pipe


def text_of(file: IO[bytes]) -> str:
    """All that is in a file that another process writes, if it is no more than 1 MiB."""
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that has a session of its own, and its children with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

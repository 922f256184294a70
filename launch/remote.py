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
        if self.ssh_config is not None:
            words = ["-F", str(Path(self.ssh_config).resolve()), *words]
        if self.ssh_port is not None:
            words += ["-p", str(self.ssh_port)]
        if self.ssh_user is not None:
            words += ["-l", self.ssh_user]
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

    Args:
        ssh: how to reach them.

    Raises:
        ConfigurationError: there is no ssh here.
    """

    def __init__(self, ssh: SshConfig) -> None:
        if shutil.which("ssh") is None:
            raise ConfigurationError(
                "there is no ssh on this machine: install its client (Debian: "
                "openssh-client)"
            )
        self.ssh = ssh
        self._own = own_addresses()
        self._waited_for: set[subprocess.Popen[bytes]] = set()

    def is_own(self, host: Host) -> bool:
        """Whether a host is this machine."""
        return is_own(host, self._own)

    def command(self, host: Host, words: Sequence[str]) -> list[str]:
        """The command of this machine that runs `words` on a host."""
        if self.is_own(host):
            return list(words)
        return ["ssh", *self.ssh.options(), host.address, shlex.join(words)]

    def start(
        self, host: Host, words: Sequence[str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; `options` are those of ``subprocess.Popen``.

        When ssh ends, its command goes on: whoever starts one has to end it.
        """
        return subprocess.Popen(self.command(host, words), **options)

    def run(
        self,
        host: Host,
        words: Sequence[str],
        *,
        timeout: float,
        stdin: bytes = b"",
    ) -> Outcome:
        """Run a command on a host and wait for its end.

        Args:
            host: where.
            words: the command.
            timeout: seconds to wait; what runs on another host then is left to itself.
            stdin: what it reads.
        """
        # A session of its own: Ctrl-C is for the caller, who may have to clean up.
        process = self.start(
            host,
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
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
        return Outcome(
            host,
            status,
            output.decode(errors="replace"),
            errors.decode(errors="replace"),
        )

    def run_on_all(
        self,
        hosts: Sequence[Host],
        words: Sequence[str],
        *,
        timeout: float,
        stdin: bytes = b"",
    ) -> list[Outcome]:
        """Run a command on all hosts at once; the outcomes in their order."""
        return self.on_all(
            hosts, lambda host: self.run(host, words, timeout=timeout, stdin=stdin)
        )

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


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that has a session of its own, and its children with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def with_environment(words: Sequence[str], environment: dict[str, str]) -> list[str]:
    """A command with variables set, and in the current folder, for another machine."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return ["env", "--chdir", os.getcwd(), *settings, *words]

"""Several hosts on one machine: network namespaces, each with an address and an sshd.

The namespaces hang on a bridge in one of their own, so that nothing of the machine's
network is touched; every host has an interface `eth0`, a host name and /etc/hosts of its
own, and no way out. Who logs in sees the processes of the host alone. File systems are
those of the machine.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

_PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
_SSHD = """
Port {port}
ListenAddress {address}
HostKey {keys}/host
AuthorizedKeysFile {keys}/client.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
SetEnv {environment}
"""
_SSH = """
Host *
  Port {port}
  IdentityFile {keys}/client
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  StrictHostKeyChecking accept-new
  ControlMaster no
  LogLevel ERROR
"""
_SPACES = ["--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
PORT = 2222


def find_program(name):
    """Path of a program, also of those that are for root; None where there is none."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def why_not():
    """Why hosts cannot be made here, or None if they can."""
    for program, package in _PROGRAMS.items():
        if find_program(program) is None:
            return f"there is no {program} here (Debian: {package})"
    if os.geteuid() != 0:
        return "network namespaces want root"
    tried = subprocess.run(
        ["unshare", "--net", *_SPACES, "true"],
        capture_output=True,
        check=False,
    )
    if tried.returncode:
        return f"namespaces are not permitted here: {tried.stderr.decode().strip()}"
    return None


class TestHost:
    """One of the hosts.

    Attributes:
        name: its host name, which the others resolve too.
        address: its IP address on eth0.
    """

    __test__ = False

    def __init__(self, fleet, number):
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        self.namespace = f"{fleet.prefix}n{number}"
        self._fleet = fleet
        self.environment = {}
        self._sshd = None

    def command(self, words):
        """`words` as a command of the machine that uses this host's network."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]

    def login(self, words):
        """`words` as a command on this host, among its processes and with its name.

        It is a child of the process that is started, which passes no signals on.
        """
        (sshd,) = psutil.Process(self._sshd.pid).children()
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(sshd.pid), *spaces, *map(str, words)]

    def start_sshd(self, mounts=(), **environment):
        """Start its sshd, or start it anew with variables for all who log in.

        Args:
            mounts: arguments of mount(8) for what this host alone has; they last until
                it is started anew.
            environment: the variables, besides those of earlier starts.
        """
        self.stop_sshd()
        self.environment |= environment
        settings = self._fleet.folder / f"sshd_{self.name}"
        settings.write_text(
            _SSHD.format(
                port=PORT,
                address=self.address,
                keys=self._fleet.folder,
                environment=" ".join(
                    f'{name}="{value}"'
                    for name, value in {
                        "PATH": os.environ["PATH"],
                        **self.environment,
                    }.items()
                ),
            )
        )
        sshd = find_program("sshd")
        # Each command in a network namespace has a mount namespace of its own.
        steps = [["hostname", self.name], *(["mount", *words] for words in mounts)]
        steps.append(["exec", sshd, "-D", "-e", "-f", settings])
        inner = " && ".join(shlex.join(map(str, step)) for step in steps)
        with open(self._fleet.folder / f"sshd_{self.name}.log", "ab") as log:
            self._sshd = subprocess.Popen(
                self.command(["unshare", *_SPACES, "sh", "-c", inner]),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        probe = f"exec 3<>/dev/tcp/{self.address}/{PORT}"
        while subprocess.run(
            self.command(["bash", "-c", probe]), capture_output=True, check=False
        ).returncode:
            assert self._sshd.poll() is None, "sshd ended"
            assert time.monotonic() < deadline, "sshd does not answer"
            time.sleep(0.05)

    def stop_sshd(self):
        """End its sshd and all who have logged in; it refuses connections then."""
        if self._sshd is not None:
            children = psutil.Process(self._sshd.pid).children()
            self._sshd.kill()
            self._sshd.wait()
            self._sshd = None
            # They end a moment after it, and hold on to their port until then.
            psutil.wait_procs(children, timeout=20)

    def ip(self, *words):
        """Run ip(8) on this host."""
        return _ip("-n", self.namespace, *words)

    def write_hosts(self, lines):
        """Give the host an /etc/hosts of these lines; for programs that start later."""
        folder = Path("/etc/netns") / self.namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))

    def add_interface(self, name, address):
        """Give it an interface that the hosts share, with an address such as 10.0.0.1/24."""
        switch, port = self._fleet.switch, f"{self.name}_{name}"
        _ip(
            *("-n", switch, "link", "add", port, "type", "veth"),
            *("peer", "name", name, "netns", self.namespace),
        )
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        self.ip("address", "add", address, "dev", name)
        self.ip("link", "set", name, "up")

    def link(self, state, name="eth0"):
        """Set the link of an interface `up` or `down`."""
        _ip("-n", self._fleet.switch, "link", "set", f"{self.name}_{name}", state)

    def pids(self):
        """Processes of the host, its sshd and namespace wrappers included."""
        found = _ip("netns", "pids", self.namespace).split()
        return [int(pid) for pid in found]

    def kill(self):
        """Lose the host: its link, and all of its processes at once."""
        self.link("down")
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._sshd is not None:
            self._sshd.wait()
            self._sshd = None


class Fleet:
    """Hosts node1 to nodeN; a context manager.

    Args:
        folder: for keys and settings.
        count: how many hosts.

    Attributes:
        hosts: the hosts.
        ssh_config: file for `ssh -F`.
    """

    def __init__(self, folder, count):
        self.folder = Path(folder)
        # Names of namespaces are the machine's, and several tests may run at once.
        self.prefix = f"ten{os.getpid()}_{next(_NUMBERS)}_"
        self.switch = f"{self.prefix}switch"
        self.hosts = [TestHost(self, number) for number in range(1, count + 1)]
        self.ssh_config = self.folder / "ssh_config"

    def __enter__(self):
        try:
            self._make_keys()
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.hosts:
                self._connect(host)
            names = [f"{host.address} {host.name}" for host in self.hosts]
            for host in self.hosts:
                host.write_hosts(["127.0.0.1 localhost", *names])
                host.start_sshd()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make_keys(self):
        for name in ("client", "host"):
            subprocess.run(
                [
                    "ssh-keygen",
                    "-q",
                    "-t",
                    "ed25519",
                    "-N",
                    "",
                    "-f",
                    self.folder / name,
                ],
                check=True,
            )
        self.ssh_config.write_text(_SSH.format(port=PORT, keys=self.folder))
        # sshd wants it, whatever its settings.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)

    def _connect(self, host):
        _ip("netns", "add", host.namespace)
        host.ip("link", "set", "lo", "up")
        host.add_interface("eth0", f"{host.address}/24")

    def __exit__(self, *_):
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill()
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", host.namespace)
            shutil.rmtree(f"/etc/netns/{host.namespace}", ignore_errors=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "delete", self.switch)

    def hostfile(self, slots=1, hosts=None):
        """Write a hostfile of all hosts, or some; returns its path."""
        path = self.folder / "hostfile"
        lines = [f"{host.address} slots={slots}\n" for host in hosts or self.hosts]
        path.write_text("".join(lines))
        return path


_NUMBERS = itertools.count()


def _ip(*words):
    done = subprocess.run(
        [find_program("ip"), *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.fixture
def fleet_of(tmp_path):
    """A function that makes a fleet of N hosts, removed after the test."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:

        def make(count):
            folder = tmp_path / "fleet"
            folder.mkdir()
            return stack.enter_context(Fleet(folder, count))

        yield make

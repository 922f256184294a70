"""The hosts of a run: hostfiles, lists and what a scheduler has given.

A hostfile is DeepSpeed's: a line `ADDRESS slots=N` for each host, comments after `#`.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import psutil

from ten_dist.config.options import Options, metavar
from ten_dist.errors import ConfigurationError
from ten_dist.files import read_user_text, write_text

_ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]*[A-Za-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine of a run."""

    address: str
    """Name or IP address, as ssh takes it."""
    slots: int
    """Ranks to run on it: its GPUs, or processes on a CPU."""

    def __str__(self) -> str:
        return self.address


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig(Options):
    """Which machines a run has; each field is an option of the commands that reach them."""

    GROUP: ClassVar[str] = "hosts"
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("hostfile", "hosts")

    hostfile: Annotated[str | None, metavar("FILE")] = None
    """File with a line `ADDRESS slots=GPUS` for each host; without it and --hosts, the
    hosts of the Slurm allocation."""
    hosts: Annotated[str | None, metavar("ADDRESS:N,...")] = None
    """The hosts themselves, ADDRESS:GPUS,ADDRESS:GPUS."""

    def read(self, *, slurm: bool = False) -> list[Host]:
        """The hosts that the options name, or those of the Slurm allocation.

        Raises:
            ConfigurationError: there are none, some cannot be used, or `slurm` asks for
                an allocation and there is none.
        """
        if self.hostfile is not None:
            hosts = read_hostfile(Path(self.hostfile))
        elif self.hosts is not None:
            hosts = parse_hosts(self.hosts)
        elif slurm or "SLURM_JOB_NODELIST" in os.environ:
            hosts = slurm_hosts()
        else:
            raise ConfigurationError(
                "there are no hosts: give --hostfile FILE or --hosts ADDRESS:GPUS,..., "
                "or start inside a Slurm allocation"
            )
        check_names(hosts)
        return hosts


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile, in its order.

    Raises:
        ConfigurationError: there is no such file (DeepSpeed itself would then train on
            this machine alone), a line of it is not `ADDRESS slots=N`, it names no host,
            or one twice.
    """
    text = read_user_text(
        path, f"--hostfile {path}", "it has a line `ADDRESS slots=GPUS` for each host"
    )
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([0-9]+)", words[-1])
        if len(words) != 2 or slots is None:
            raise ConfigurationError(
                f"--hostfile {path}, line {number}: `{line.strip()}` is not "
                "`ADDRESS slots=GPUS`"
            )
        hosts.append(Host(words[0], int(slots[1])))
    return _checked(hosts, f"--hostfile {path}")


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Replace a hostfile, whole.

    Raises:
        ConfigurationError: a host stands twice or has no slots, or there is none.
        OSError: it cannot be written.
    """
    lines = [f"{host.address} slots={host.slots}\n" for host in hosts]
    _checked(hosts, f"hostfile {path}")
    write_text(path, "".join(lines))


def parse_hosts(text: str) -> list[Host]:
    """The hosts of a list such as `10.0.0.2:8,10.0.0.3:8`; else ConfigurationError.

    Without `:N` a host has one slot. An IPv6 address with slots stands in brackets:
    `[fd00::2]:8`.
    """
    hosts = []
    for part in text.split(","):
        found = re.fullmatch(r"\[?([^\[\]]*?)\]?(?::([0-9]+))?", part.strip())
        if part.count(":") > 1 and not part.strip().startswith("["):
            found = re.fullmatch(r"(.*)()", part.strip())
        if found is None:
            raise ConfigurationError(f"--hosts: `{part}` is not `ADDRESS:GPUS`")
        hosts.append(Host(found[1], int(found[2] or 1)))
    return _checked(hosts, "--hosts")


def slurm_hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The hosts of the Slurm allocation that this process runs in.

    Slots are its GPUs on each node, or where it has none its tasks.

    Raises:
        ConfigurationError: there is no allocation, or it does not say its slots.
    """
    names = environment.get("SLURM_JOB_NODELIST")
    if not names:
        raise ConfigurationError(
            "--launcher slurm: SLURM_JOB_NODELIST is not set, so this is no Slurm "
            "allocation: start inside salloc or sbatch, or give --hostfile"
        )
    try:
        from ClusterShell.NodeSet import NodeSet, NodeSetException
    except ImportError:
        raise ConfigurationError(
            "--launcher slurm needs the package ClusterShell: "
            "pip install 'ten_dist[slurm]'"
        ) from None
    try:
        # A set sorts its names, while slots are counted in the order of the list.
        parts = re.split(r",(?![^\[]*\])", names)
        addresses = [name for part in parts for name in NodeSet(part)]
    except NodeSetException as error:
        raise ConfigurationError(f"SLURM_JOB_NODELIST {names}: {error}") from None
    slots = _slurm_slots(environment, len(addresses))
    hosts = [Host(address, count) for address, count in zip(addresses, slots)]
    return _checked(hosts, f"SLURM_JOB_NODELIST {names}")


def _slurm_slots(environment: Mapping[str, str], nodes: int) -> list[int]:
    """Slots of each node of a Slurm allocation."""
    for name in ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        # Either a number or TYPE:NUMBER.
        found = re.fullmatch(r"(?:[^:]+:)?([0-9]+)", environment.get(name, ""))
        if found is not None:
            return [int(found[1])] * nodes
    counts = environment.get("SLURM_TASKS_PER_NODE", "")
    slots: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if found is None:
            break
        slots += [int(found[1])] * int(found[2] or 1)
    if len(slots) != nodes:
        raise ConfigurationError(
            "the Slurm allocation says neither SLURM_GPUS_PER_NODE nor "
            f"SLURM_TASKS_PER_NODE for its {nodes} nodes: ask for --gpus-per-node or "
            "--ntasks-per-node"
        )
    return slots


def _checked(hosts: Sequence[Host], source: str) -> list[Host]:
    """The hosts; ConfigurationError where there is none, an impossible one, or one twice."""
    if not hosts:
        raise ConfigurationError(f"{source} names no host")
    seen = set()
    for host in hosts:
        user, at, address = host.address.rpartition("@")
        if at and _ADDRESS.fullmatch(address):
            raise ConfigurationError(
                f"{source}: `{host.address}` names a user: write `{address}`, and give "
                f"--ssh_user {user}"
            )
        if not _ADDRESS.fullmatch(host.address):
            raise ConfigurationError(
                f"{source}: `{host.address}` is not the address of a host"
            )
        if host.slots < 1:
            raise ConfigurationError(
                f"{source}: {host} has no slots: give it 1 or more"
            )
        if host.address in seen:
            raise ConfigurationError(f"{source} names {host} twice: leave one out")
        seen.add(host.address)
    return list(hosts)


def check_names(hosts: Sequence[Host]) -> None:
    """Raise ConfigurationError for a name that does not resolve here, for two names of one
    machine, and for a loopback address, at which every machine finds itself, among several."""
    owners: dict[str, Host] = {}
    for host in hosts:
        try:
            addresses = resolve(host.address)
        except OSError as error:
            raise ConfigurationError(
                f"host {host} does not resolve to an address here ({error.strerror}): "
                "correct the name, or give the address"
            ) from None
        for address in addresses:
            if len(hosts) > 1 and ipaddress.ip_address(address).is_loopback:
                raise ConfigurationError(
                    f"host {host} resolves to {address}, at which every machine finds "
                    "itself: give its address in the network that joins the hosts"
                )
            first = owners.setdefault(address, host)
            if first != host:
                raise ConfigurationError(
                    f"hosts {first} and {host} are the same machine ({address}): leave "
                    "one out"
                )


def resolve(name: str) -> list[str]:
    """IP addresses of a name or address; OSError where it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        # A part of the name is empty, or longer than a name can have.
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name) from None
    # The zone of a link-local address, fe80::1%eth0, is of no use to another machine.
    return sorted({str(entry[4][0]).partition("%")[0] for entry in found})


def count_slots(hosts: Iterable[Host]) -> int:
    """Ranks that run on some hosts together."""
    return sum(host.slots for host in hosts)


def is_own(host: Host, own: Container[str]) -> bool:
    """Whether a host is this machine, whose addresses are `own`."""
    try:
        return any(address in own for address in resolve(host.address))
    except OSError:
        return False


def own_addresses() -> dict[str, str]:
    """IP addresses of this machine, each with the name of its network interface."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }

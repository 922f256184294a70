"""Environment variables that ranks need on every host.

They are those of `.deepspeed_env` in the home and the current folder, those given with
`--env`, and those of the launching process that say how ranks compute and communicate.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.hosts import own_addresses
from ten_dist.errors import ConfigurationError
from ten_dist.files import read_user_text

INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Which network interface ranks talk over; without them it is guessed from the host
name, which may resolve to a loopback address."""
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_")
_NAMES = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "DEEPSPEED_TIMEOUT", "PYTHONPATH")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def add_environment_option(parser: argparse.ArgumentParser) -> None:
    """Add `--env`, whose values are the `given` of :func:`rank_environment`."""
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of all ranks; may be given several times. "
        ".deepspeed_env in the home or current folder has them too, a line each",
    )


def rank_environment(
    given: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    folders: Sequence[Path] | None = None,
) -> dict[str, str]:
    """Variables for all ranks.

    Args:
        given: `NAME=VALUE` of each `--env`; these replace all others.
        environment: of the launching process; the settings of NCCL, gloo, UCX and OpenMP
            in it and a few more are taken, which others replace.
        folders: folders with a `.deepspeed_env`; by default home, then the current one.

    Raises:
        ConfigurationError: something is not `NAME=VALUE`, or a file cannot be read.
    """
    found = {
        name: value
        for name, value in environment.items()
        if name in _NAMES or name.startswith(_PREFIXES)
    }
    for folder in (Path.home(), Path.cwd()) if folders is None else folders:
        path = folder / ".deepspeed_env"
        if path.is_file():
            lines = read_user_text(path, str(path)).splitlines()
            for number, line in enumerate(lines, start=1):
                if line.strip() and not line.lstrip().startswith("#"):
                    name, value = _variable(line.strip(), f"{path}, line {number}:")
                    found[name] = value
    found.update(_variable(text, "--env") for text in given)
    return found


def _variable(text: str, source: str) -> tuple[str, str]:
    match = _VARIABLE.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{source} `{text}` is not NAME=VALUE")
    return match[1], match[2]


def with_interface(environment: Mapping[str, str], interface: str) -> dict[str, str]:
    """Variables and the interface to use, where they do not name one themselves."""
    return {**dict.fromkeys(INTERFACE_VARIABLES, interface), **environment}


def interface_towards(address: str) -> str:
    """The network interface of this machine that has the route to an address;
    ConfigurationError where none has."""
    family, _, _, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the system only looks up the route.
            probe.connect(target)
        except OSError as error:
            raise ConfigurationError(
                f"{socket.gethostname()} has no route to the master's address "
                f"{address} ({error.strerror}): give one in the network that joins the "
                "hosts, --master_address"
            ) from None
        own = probe.getsockname()[0].partition("%")[0]
    interfaces = own_addresses()
    if own in interfaces:
        return interfaces[own]
    raise ConfigurationError(
        f"{socket.gethostname()} has no interface with its own address {own}: name "
        "one with --env NCCL_SOCKET_IFNAME=... --env GLOO_SOCKET_IFNAME=..."
    )

"""Is everything right on the hosts of a run, before it costs anything?

ten-dist preflight --hostfile hostfile --data DATA --output_dir RUN

Over ssh, on all hosts at once: can they be reached, do clocks, Python, code and packages
agree, are GPUs there and well, is there room, is the data the same, do the hosts share the
output folder, can each reach every other, and how fast is an all-reduce between them. A
table shows the hosts and every problem with its cure. Nothing stays on the hosts, and every
step has a time limit.

Exit status: 0 a run can begin, perhaps with warnings; 2 there are errors.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from launch.hosts import HostsConfig
from launch.preflight.check import check_hosts
from launch.preflight.settings import PreflightSettings
from launch.rank_environment import add_environment_option, rank_environment
from launch.remote import Remote, SshConfig
from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.console import say
from ten_dist.errors import EXIT_CONFIGURATION_ERROR, ConfigurationError
from ten_dist.files import unwritable, write_json

_OPTIONS = {f.name for f in dataclasses.fields(PreflightSettings)} - {"network_test"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist preflight`."""
    add_options(parser, HostsConfig)
    add_options(parser, SshConfig)
    add_options(parser, PreflightSettings, only=_OPTIONS)
    parser.group("checks").add_argument(
        "--no_network_test",
        dest="network_test",
        action="store_false",
        default=True,
        help="do not measure an all-reduce across the hosts",
    )
    add_environment_option(parser)
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that was found into it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the hosts and print the table; returns the exit status, see above.

    Raises:
        ConfigurationError: an option is wrong, or the list of hosts.
    """
    hosts = given(arguments, HostsConfig).read()
    if arguments.json is not None:
        reason = unwritable(Path(arguments.json).absolute().parent)
        if reason is not None:
            raise ConfigurationError(f"--json {arguments.json}: its folder {reason}")
    settings = given(arguments, PreflightSettings)
    remote = Remote(given(arguments, SshConfig))
    environment = rank_environment(arguments.env)
    report = check_hosts(hosts, remote, settings, environment, say)
    say(report.table())
    if arguments.json is not None:
        write_json(Path(arguments.json), report.to_dict())
    return EXIT_CONFIGURATION_ERROR if report.errors else 0

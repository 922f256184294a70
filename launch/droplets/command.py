"""Rent the machines of a run from DigitalOcean, and give them back.

ten-dist droplets plan                  sizes with their prices and regions, and what a run costs
ten-dist droplets up --run NAME ...     create the droplets of a run; again, what is missing
ten-dist droplets status                droplets, their cost so far, and when they expire
ten-dist droplets setup --run NAME      wait until they are installed, and join them over ssh
ten-dist droplets hostfile --run NAME   hostfile of their private addresses
ten-dist droplets down --run NAME       destroy them, and see that they are gone
ten-dist droplets reap                  destroy all that have expired or cost their budget

The token is read from DIGITALOCEAN_TOKEN. A droplet is billed until it is destroyed, also
when it is switched off: `reap` has to run somewhere every few minutes (`reap --every 10`,
cron, or `ten-dist supervise --reap_droplets 10`) for the limits of `up` to hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.droplets.api import Api, ApiConfig
from launch.droplets.catalogue import Catalogue, Size
from launch.droplets.creation import Creation, UpConfig
from launch.droplets.fleet import (
    Droplet,
    list_droplets,
    of_run,
    total_cost,
    untagged_of_run,
)
from launch.droplets.nodes import set_up
from launch.droplets.removal import POLL_SECONDS, WAIT_MINUTES, down, reap
from launch.droplets.tags import check_run_name
from launch.hosts import Host, write_hostfile
from launch.remote import SshConfig
from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.console import complain, say
from ten_dist.errors import ConfigurationError, TrainingError

_ACTIONS = {
    "plan": "what there is, and what it costs",
    "up": "create the droplets of a run",
    "status": "droplets, their cost and expiry",
    "setup": "wait for them, and join them over ssh",
    "hostfile": "hostfile of their private addresses",
    "down": "destroy the droplets of a run",
    "reap": "destroy all that have expired",
}
_CHANGING = ("up", "down", "reap")
# Of droplets, hours, minutes and seconds alike: more is a slip of the keyboard.
_MOST = 100_000
_CONNECTION = ("endpoint", "attempts", "retry_wait", "request_timeout")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist droplets`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    parsers = {
        name: actions.add_parser(name, help=text, allow_abbrev=False)
        for name, text in _ACTIONS.items()
    }
    _add_own_options(parsers)
    add_options(parsers["setup"], SshConfig)
    for name in ("setup", "down", "reap"):
        parsers[name].add_argument(
            "--wait_minutes",
            type=float,
            default=WAIT_MINUTES if name != "setup" else 30.0,
            metavar="X",
            help="give up after so long [default: %(default)s]",
        )
    for name in ("down", "reap"):
        parsers[name].add_argument(
            "--poll_interval",
            type=float,
            default=POLL_SECONDS,
            metavar="X",
            help="seconds between looks at the droplets [default: %(default)s]",
        )
    for name, action in parsers.items():
        names = (*_CONNECTION, "dry_run") if name in _CHANGING else _CONNECTION
        add_options(action, ApiConfig, only=names)


def _add_own_options(parsers: dict[str, ArgumentParser]) -> None:
    """Add the options that say what an action is about."""
    add_options(parsers["up"], UpConfig)
    for name in ("setup", "hostfile", "down"):
        parsers[name].add_argument(
            "--run", metavar="NAME", required=True, help="name of the run"
        )
    for name in ("status", "reap"):
        parsers[name].add_argument(
            "--run", metavar="NAME", help="only this run [default: all]"
        )
    plan = parsers["plan"]
    plan.add_argument("--size", metavar="SIZE", help="what a run with it costs")
    plan.add_argument("--region", metavar="REGION", help="what there is in it")
    plan.add_argument(
        "--count", type=int, default=1, metavar="N", help="droplets [default: 1]"
    )
    plan.add_argument(
        "--max_hours",
        type=float,
        default=24.0,
        metavar="X",
        help="of what a run with it costs [default: 24.0]",
    )
    plan.add_argument(
        "--all_sizes", action="store_true", help="also those without GPUs"
    )
    parsers["status"].add_argument(
        "--json", action="store_true", help="print JSON instead"
    )
    parsers["hostfile"].add_argument(
        "--output", metavar="FILE", required=True, help="file to write"
    )
    parsers["down"].add_argument(
        "--droplet",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help="only this one; may be given several times",
    )
    parsers["reap"].add_argument(
        "--every",
        type=float,
        metavar="MINUTES",
        help="go on for ever, so often [default: once]",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ConfigurationError: an option is wrong, the token is missing or refused, or what
            is asked for does not exist or costs too much.
        TrainingError: droplets are not as they should be, or the API fails.
    """
    for name in ("count", "max_hours", "wait_minutes", "poll_interval", "every"):
        value = getattr(arguments, name, None)
        if value is not None and not 0 < value <= _MOST:
            least = "1 or more" if name == "count" else "more than 0"
            raise ConfigurationError(
                f"--{name} must be {least} and at most {_MOST:,}, not {value}"
            )
    if getattr(arguments, "run", None) is not None:
        check_run_name(arguments.run)
    wanted = None
    if arguments.action == "up":
        wanted = given(arguments, UpConfig)
    ssh = given(arguments, SshConfig)
    config = given(arguments, ApiConfig)
    with contextlib.closing(Api(config)) as api:
        if wanted is not None:
            Creation(api, wanted).run()
        elif arguments.action == "plan":
            _plan(Catalogue(api), arguments)
        elif arguments.action == "status":
            _status(api, arguments.run, arguments.json)
        elif arguments.action == "setup":
            droplets = _ready(api, arguments.run)
            set_up(droplets, ssh, arguments.wait_minutes)
        elif arguments.action == "hostfile":
            _hostfile(_ready(api, arguments.run), Path(arguments.output))
        elif arguments.action == "down":
            down(
                api,
                arguments.run,
                arguments.droplet,
                wait_minutes=arguments.wait_minutes,
                poll_interval=arguments.poll_interval,
            )
        else:
            _reap(api, arguments)


def _plan(catalogue: Catalogue, arguments: argparse.Namespace) -> None:
    count, hours = arguments.count, arguments.max_hours
    region, chosen = arguments.region, arguments.size
    if region is not None:
        catalogue.check_region(region)
    if chosen is not None and region is not None:
        catalogue.size_in(chosen, region)
    if chosen is not None:
        price = catalogue.size(chosen).hourly_price * count
        where = f" in {region}" if region else ""
        say(
            f"{count} x {chosen}{where}: ${price:,.2f} an hour, ${price * hours:,.2f} "
            f"for --max_hours {hours:g}"
        )
    shown = [
        size
        for size in catalogue.sizes.values()
        if size.slug == chosen
        or (
            (size.gpus or arguments.all_sizes)
            and (region is None or region in size.regions)
        )
    ]
    if not shown:
        say(f"the API has no such size{f' in {region}' if region else ''}")
        return
    rows = [_size_row(size, count, hours) for size in shown]
    heading = [
        *("size", "GPUs", "vCPUs", "GiB", "scratch", "$/hour"),
        *(f"{count} an hour", f"for {hours:g} h", "available in"),
    ]
    _table(heading, rows, left=(0, 1, 4, 8))


def _size_row(size: Size, count: int, hours: float) -> list[str]:
    price = size.hourly_price
    return [
        size.slug,
        f"{size.gpus} x {size.gpu_model}" if size.gpus else "-",
        f"{size.vcpus}",
        f"{size.memory_gib:,.0f}",
        size.scratch or "-",
        f"{price:,.2f}",
        f"{price * count:,.2f}",
        f"{price * count * hours:,.2f}",
        " ".join(size.regions) or "nowhere now",
    ]


def _status(api: Api, run: str | None, as_json: bool) -> None:
    there = list_droplets(api)
    now = api.now()
    if run is None:
        tagged = [(d.tags.run, d.id, d) for d in there if d.tags is not None]
        ours = [droplet for _, _, droplet in sorted(tagged, key=lambda t: t[:2])]
    else:
        ours = of_run(there, run) + untagged_of_run(there, run)
    if as_json:
        say(json.dumps([_as_dict(droplet, now) for droplet in ours], indent=2))
        return
    if not ours:
        say("there are no droplets" + (f" of run {run}" if run else " of any run"))
        return
    heading = ["run", "droplet", "id", "state", "size", "region", "public", "private"]
    heading += ["hours", "$", "expires in"]
    rows = [_droplet_row(droplet, now) for droplet in ours]
    _table(heading, rows, left=range(8))
    rate = sum(droplet.hourly_price or 0.0 for droplet in ours)
    say(
        f"{len(ours)} droplets, ${rate:,.2f} an hour, "
        f"${total_cost(ours, now):,.2f} so far"
    )


def _droplet_row(droplet: Droplet, now: float) -> list[str]:
    tags = droplet.tags
    if tags is None or tags.expires is None:
        left = "never"
    elif tags.expires <= now:
        left = "overdue"
    else:
        left = f"{(tags.expires - now) / 3600:,.1f} h"
    return [
        "(no tag)" if tags is None else tags.run,
        droplet.name,
        str(droplet.id),
        droplet.status,
        droplet.size,
        droplet.region,
        droplet.public or "-",
        droplet.private or "-",
        f"{(now - droplet.created) / 3600:,.1f}",
        "?" if droplet.hourly_price is None else f"{droplet.cost(now):,.2f}",
        left,
    ]


def _as_dict(droplet: Droplet, now: float) -> dict[str, Any]:
    tags = droplet.tags
    return {
        "run": tags and tags.run,
        "name": droplet.name,
        "id": droplet.id,
        "status": droplet.status,
        "size": droplet.size,
        "region": droplet.region,
        "gpus": droplet.gpus,
        "public": droplet.public,
        "private": droplet.private,
        "age_hours": (now - droplet.created) / 3600,
        "hourly_price": droplet.hourly_price,
        "cost": droplet.cost(now),
        "expires": tags and tags.expires,
        "budget": tags and tags.budget,
    }


def _ready(api: Api, run: str) -> list[Droplet]:
    """The droplets of a run, all of which run.

    Raises:
        ConfigurationError: it has none.
        TrainingError: one does not run yet, or is there twice.
    """
    droplets = of_run(list_droplets(api), run)
    if not droplets:
        raise ConfigurationError(f"--run {run} has no droplets: create some with `up`")
    names = [droplet.name for droplet in droplets]
    for droplet in droplets:
        if names.count(droplet.name) > 1:
            raise TrainingError(
                f"{droplet.name} is there twice: end one with `ten-dist droplets down "
                f"--run {run} --droplet {droplet.id}`"
            )
        if not droplet.ready:
            raise TrainingError(
                f"{droplet.name} ({droplet.id}) is {droplet.status} and does not have "
                "both addresses: the same `up` again waits for it or makes it anew"
            )
    return droplets


def _hostfile(droplets: Sequence[Droplet], path: Path) -> None:
    # A droplet without a GPU runs one process, for rehearsals.
    hosts = [Host(droplet.addresses[1], droplet.gpus or 1) for droplet in droplets]
    try:
        write_hostfile(path, hosts)
    except OSError as error:
        raise ConfigurationError(
            f"--output {path} cannot be written: {error.strerror}"
        ) from None
    slots = sum(host.slots for host in hosts)
    say(
        f"{path}: {len(hosts)} hosts, {slots} slots; the first is --master_addr "
        f"{hosts[0].address}"
    )


def _reap(api: Api, arguments: argparse.Namespace) -> None:
    while True:
        try:
            count = reap(
                api,
                arguments.run,
                wait_minutes=arguments.wait_minutes,
                poll_interval=arguments.poll_interval,
            )
            if not count:
                say("nothing has expired")
        except TrainingError as error:
            if arguments.every is None:
                raise
            # The next time may be better.
            complain(str(error))
        if arguments.every is None:
            return
        time.sleep(arguments.every * 60)


def _table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]
) -> None:
    """Print columns; those with the numbers in `left` begin at the same place."""
    lines = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths))
        ]
        say("  ".join(cells).rstrip())

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
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from launch.droplets.api import Api, ApiConfig
from launch.droplets.catalogue import Catalogue, Size
from launch.droplets.creation import Creation, UpConfig
from launch.droplets.fleet import (
    AMOUNT,
    COUNT,
    Droplet,
    check_run_name,
    list_droplets,
    of_run,
    total_cost,
)
from launch.droplets.nodes import SetupConfig, set_up
from launch.droplets.removal import Patience, down, reap
from launch.hosts import Host, count_slots, write_hostfile
from launch.table import table
from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import Options, metavar
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
_CONNECTION = ("endpoint", "attempts", "retry_wait", "request_timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Options):
    """Each field is an option of `ten-dist droplets plan`."""

    size: str | None = None
    """What a run with this size costs."""
    region: str | None = None
    """What there is in this region."""
    count: Annotated[int, COUNT] = 1
    """Droplets of the run."""
    max_hours: Annotated[float, AMOUNT] = 24.0
    """Hours of the run."""
    all_sizes: bool = False
    """Show sizes without GPUs, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReapConfig(Patience):
    """Each field is an option of `ten-dist droplets reap`."""

    every: Annotated[float | None, AMOUNT, metavar("MINUTES")] = None
    """Go on for ever, with so many minutes between two times; by default once."""


_OPTIONS: dict[str, type[Options]] = {
    "plan": PlanConfig,
    "up": UpConfig,
    "setup": SetupConfig,
    "down": Patience,
    "reap": ReapConfig,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist droplets`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        if name not in ("plan", "up"):
            needed = name in ("setup", "hostfile", "down")
            text = "name of the run" if needed else "only this run [default: all]"
            action.add_argument("--run", metavar="NAME", required=needed, help=text)
        if name in _OPTIONS:
            add_options(action, _OPTIONS[name])
        if name == "status":
            action.add_argument(
                "--json", action="store_true", help="print JSON instead"
            )
        elif name == "hostfile":
            action.add_argument(
                "--output", metavar="FILE", required=True, help="file to write"
            )
        elif name == "down":
            action.add_argument(
                "--droplet",
                type=int,
                action="append",
                default=[],
                metavar="ID",
                help="only this one; may be given several times",
            )
        names = (*_CONNECTION, "dry_run") if name in _CHANGING else _CONNECTION
        add_options(action, ApiConfig, only=names)


def run(arguments: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ConfigurationError: an option is wrong, the token is missing or refused, or what
            is asked for does not exist or costs too much.
        TrainingError: droplets are not as they should be, or the API fails.
    """
    if getattr(arguments, "run", None) is not None:
        check_run_name(arguments.run)
    options = given(arguments, _OPTIONS.get(arguments.action, Options))
    with contextlib.closing(Api(given(arguments, ApiConfig))) as api:
        if isinstance(options, PlanConfig):
            _plan(Catalogue(api), options)
        elif isinstance(options, UpConfig):
            Creation(api, options).run()
        elif isinstance(options, SetupConfig):
            set_up(_ready(api, arguments.run), options)
        elif isinstance(options, ReapConfig):
            _reap(api, arguments.run, options)
        elif isinstance(options, Patience):
            down(api, arguments.run, arguments.droplet, options)
        elif arguments.action == "status":
            _status(api, arguments.run, arguments.json)
        else:
            _hostfile(_ready(api, arguments.run), Path(arguments.output))


def _plan(catalogue: Catalogue, config: PlanConfig) -> None:
    count, hours = config.count, config.max_hours
    region, chosen = config.region, config.size
    where = f" in {region}" if region else ""
    if region is not None:
        catalogue.check_region(region)
        if chosen is not None:
            catalogue.size_in(chosen, region)
    if chosen is not None:
        price = catalogue.size(chosen).hourly_price * count
        say(
            f"{count} x {chosen}{where}: ${price:,.2f} an hour, ${price * hours:,.2f} "
            f"for --max_hours {hours:g}"
        )
    shown = [
        size
        for size in catalogue.sizes.values()
        if size.slug == chosen
        or (
            (size.gpus or config.all_sizes)
            and (region is None or region in size.regions)
        )
    ]
    if not shown:
        say(f"the API has no such size{where}")
        return
    heading = ["size", "GPUs", "vCPUs", "GiB", "scratch", "$/hour"]
    heading += [f"{count} an hour", f"for {hours:g} h", "available in"]
    rows = [heading, *(_size_row(size, count, hours) for size in shown)]
    say("\n".join(table(rows, right=(2, 3, 5, 6, 7))))


def _size_row(size: Size, count: int, hours: float) -> list[str]:
    price = size.hourly_price
    return [
        size.slug,
        f"{size.gpus} x {size.gpu_model}" if size.gpus else "-",
        f"{size.vcpus}",
        f"{size.memory_gib:,.0f}",
        size.scratch or "-",
        *(f"{price * factor:,.2f}" for factor in (1, count, count * hours)),
        " ".join(size.regions) or "nowhere now",
    ]


def _status(api: Api, run: str | None, as_json: bool) -> None:
    there = list_droplets(api)
    now = api.now()
    if run is None:
        runs = {d.tags.run for d in there if d.tags is not None}
        ours = [droplet for name in sorted(runs) for droplet in of_run(there, name)]
    else:
        ours = of_run(there, run, untagged=True)
    facts = [_facts(droplet, now) for droplet in ours]
    if as_json:
        say(json.dumps(facts, indent=2))
        return
    if not ours:
        say("there are no droplets" + (f" of run {run}" if run else " of any run"))
        return
    heading = ["run", "droplet", "id", "state", "size", "region", "public", "private"]
    heading += ["hours", "$", "expires in"]
    rows = [heading, *(_droplet_row(fact, now) for fact in facts)]
    rate = sum(droplet.hourly_price or 0.0 for droplet in ours)
    say("\n".join(table(rows, right=(8, 9, 10))))
    say(
        f"{len(ours)} droplets, ${rate:,.2f} an hour, "
        f"${total_cost(ours, now):,.2f} so far"
    )


def _facts(droplet: Droplet, now: float) -> dict[str, Any]:
    """What is shown of a droplet, for JSON."""
    facts = dataclasses.asdict(droplet)
    created, _ = facts.pop("created"), facts.pop("tagged")
    tags = facts.pop("tags") or {"run": None, "expires": None, "budget": None}
    age = (now - created) / 3600
    return {**tags, **facts, "age_hours": age, "cost": droplet.cost(now)}


def _droplet_row(facts: dict[str, Any], now: float) -> list[str]:
    left = "never"
    if facts["expires"] is not None:
        hours = (facts["expires"] - now) / 3600
        left = f"{hours:,.1f} h" if hours > 0 else "overdue"
    return [
        facts["run"] or "(no tag)",
        *(str(facts[name]) for name in ("name", "id", "status", "size", "region")),
        *(facts[name] or "-" for name in ("public", "private")),
        f"{facts['age_hours']:,.1f}",
        "?" if facts["hourly_price"] is None else f"{facts['cost']:,.2f}",
        left,
    ]


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
                f"{droplet} is {droplet.status} and does not have both addresses: the "
                "same `up` again waits for it or makes it anew"
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
    say(
        f"{path}: {len(hosts)} hosts, {count_slots(hosts)} slots; the first is "
        f"--master_addr {hosts[0].address}"
    )


def _reap(api: Api, run: str | None, config: ReapConfig) -> None:
    while True:
        try:
            if not reap(api, run, config):
                say("nothing has expired")
        except TrainingError as error:
            if config.every is None:
                raise
            # The next time may be better.
            complain(str(error))
        if config.every is None:
            return
        time.sleep(config.every * 60)

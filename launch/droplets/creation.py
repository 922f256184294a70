"""`ten-dist droplets up`: the droplets of a run, created once each and waited for."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from launch.droplets.api import Api
from launch.droplets.catalogue import Catalogue
from launch.droplets.fleet import (
    AMOUNT,
    COUNT,
    Droplet,
    RunTags,
    check_run_name,
    droplet_name,
    list_droplets,
    of_run,
    total_cost,
)
from launch.droplets.network import ensure_firewall, ensure_vpc, parse_sources
from launch.droplets.removal import Patience, destroy
from launch.droplets.user_data import own_commit, user_data
from ten_dist.config.options import Options, metavar, more_than
from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError, TrainingError

_NAMES_PER_REQUEST = 10
_LARGEST_USER_DATA = 64 * 1024
# Listings may lag behind answers; what so many of them lack is not there.
_ABSENT_LISTINGS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpConfig(Options):
    """What to create; each field is an option of `ten-dist droplets up`."""

    run: str
    """Name of the run that the droplets are for."""
    count: Annotated[int, COUNT] = 1
    """How many droplets."""
    size: str
    """Size of each; `ten-dist droplets plan` has them with their prices."""
    region: str
    """Region of all."""
    image: str
    """Image, by slug or number."""
    ssh_key: Annotated[str, metavar("KEY,...")]
    """Keys of the account that may log in, by name, number or fingerprint, with commas."""
    ssh_from: Annotated[str, metavar("ADDRESS,...")]
    """IP addresses and networks from where ssh is let in, with commas; 0.0.0.0/0 is
    from everywhere."""
    max_hours: Annotated[float, AMOUNT]
    """Hours after which `reap` destroys the droplets, from the first call for the run."""
    max_dollars: Annotated[float | None, more_than(0)] = None
    """Dollars that the run may cost: more is not created, and `reap` destroys the
    droplets when they have cost it."""
    repository: Annotated[str, metavar("URL")]
    """URL that the droplets clone the code from, without a password."""
    commit: str | None = None
    """Commit or tag that they check out, by default that of this checkout."""
    pip_index: Annotated[str | None, metavar("URL")] = None
    """URL of a further package index, such as that of torch's builds for AMD GPUs."""
    wait_minutes: Annotated[float, AMOUNT] = 20.0
    """Minutes to wait until all droplets run; what is not there then stays and is
    billed."""
    poll_interval: Annotated[float, AMOUNT] = 5.0
    """Seconds between looks at the droplets."""

    def check_together(self) -> None:
        check_run_name(self.run)


class Creation:
    """One call of `up`: looks at what there is, and brings it to what is wanted.

    Nothing is created before all has been checked. What is created has its tags in the
    same request, and names that are the same in every call, so that it is found again
    when the answer was lost or this process ended.

    Raises:
        ConfigurationError: it cannot be as asked, or costs too much.
        ApiError: the API fails.
    """

    def __init__(self, api: Api, config: UpConfig) -> None:
        self._api, self._config = api, config
        commit = config.commit or own_commit()
        script = user_data(config.repository, commit, config.pip_index)
        if len(script.encode()) > _LARGEST_USER_DATA:
            raise ConfigurationError("--repository is too long")
        self._ssh_from = parse_sources(config.ssh_from)
        self._wanted = [droplet_name(config.run, i) for i in range(config.count)]
        catalogue = Catalogue(api)
        self._price = catalogue.size(config.size).hourly_price
        catalogue.check_region(config.region)
        self._body: dict[str, Any] = {
            "region": config.region,
            "size": config.size,
            "image": catalogue.image(config.image, config.region),
            "ssh_keys": catalogue.ssh_keys(config.ssh_key.split(",")),
            "monitoring": True,
            "user_data": script,
        }
        ours = of_run(list_droplets(api), config.run, untagged=True)
        self._failed = self._failed_ids(ours)
        self._kept = [droplet for droplet in ours if droplet.id not in self._failed]
        self._check_alike()
        names = {droplet.name for droplet in self._kept}
        self._missing = [name for name in self._wanted if name not in names]
        if self._missing:
            # What is sold out matters only to those who want more of it.
            catalogue.size_in(config.size, config.region)
        # Once: the API tells its time in whole seconds, and differently each time.
        now = api.now()
        self._tags = self._run_tags(ours, now)
        self._check_cost(now)

    def run(self) -> None:
        """Create what is missing and wait until all of it runs.

        Raises:
            TrainingError: not all of it runs; what there is stays, with its tags.
            ApiError, ConfigurationError: the API fails, or refuses the token.
        """
        api, run = self._api, self._config.run
        tags = self._tags.names()
        ensure_firewall(api, run, tags, self._ssh_from)
        self._body |= {
            "vpc_uuid": ensure_vpc(api, run, self._config.region),
            "tags": tags,
        }
        try:
            self._destroy_failed()
            for start in range(0, len(self._missing), _NAMES_PER_REQUEST):
                self._create(self._missing[start : start + _NAMES_PER_REQUEST])
            if not api.config.dry_run:
                self._wait()
        except BaseException:
            warn(
                f"what there is of run {run} is billed until it is destroyed: the same "
                f"command goes on, `ten-dist droplets status --run {run}` shows it, "
                f"`ten-dist droplets down --run {run}` destroys it"
            )
            raise

    def _check_alike(self) -> None:
        config = self._config
        for droplet in self._kept:
            if (droplet.size, droplet.region) != (config.size, config.region):
                raise ConfigurationError(
                    f"run {config.run} has {droplet.name} of size {droplet.size} in "
                    f"{droplet.region}: give these as --size and --region, or another "
                    "--run"
                )

    def _run_tags(self, droplets: Sequence[Droplet], now: float) -> RunTags:
        """The tags of new droplets: the expiry is that of the run's first one."""
        config = self._config
        known = [droplet.tags for droplet in droplets if droplet.tags is not None]
        expiries = [tags.expires for tags in known if tags.expires is not None]
        limits = [config.max_dollars, *(tags.budget for tags in known)]
        budgets = [budget for budget in limits if budget is not None]
        expires = min(expiries, default=math.floor(now + config.max_hours * 3600))
        if expires <= now:
            raise ConfigurationError(
                f"run {config.run} has expired: `ten-dist droplets down --run "
                f"{config.run}` ends it, or give another --run"
            )
        return RunTags(config.run, expires, min(budgets, default=None))

    def _check_cost(self, now: float) -> None:
        until, budget = self._tags.expires, self._tags.budget
        assert until is not None
        hours = (until - now) / 3600
        new = len(self._missing) * self._price
        cost = total_cost(self._kept, until) + new * hours
        rate = new + sum(droplet.hourly_price or 0.0 for droplet in self._kept)
        say(
            f"run {self._config.run}: {len(self._missing)} to create and "
            f"{len(self._kept)} there, {self._config.size} in {self._config.region}; "
            f"${rate:,.2f} an hour, ${cost:,.2f} until it expires in {hours:,.1f} hours"
        )
        if self._missing and budget is not None and cost > budget:
            raise ConfigurationError(
                f"run {self._config.run} would cost ${cost:,.2f} until it expires, more "
                f"than --max_dollars {budget:g}: nothing was created; allow more, or "
                "give a smaller --count or fewer --max_hours"
            )

    def _destroy_failed(self) -> None:
        """Destroy the droplets whose creation failed, which are billed all the same."""
        config = self._config
        left = destroy(
            self._api,
            lambda: [d for d in list_droplets(self._api) if d.id in self._failed],
            Patience(
                wait_minutes=config.wait_minutes, poll_interval=config.poll_interval
            ),
        )
        if left:
            names = ", ".join(map(str, left))
            raise TrainingError(
                f"{names} could not be created, and not destroyed either"
            )

    def _create(self, names: Sequence[str]) -> None:
        """Create droplets in one request."""
        for number, attempt in enumerate(self._api.attempts_at_making()):
            if number:
                # Perhaps they are being created: look before asking for them again.
                there = {droplet.name for droplet in list_droplets(self._api)}
                names = [name for name in names if name not in there]
            with attempt:
                if names:
                    body = {"names": names, **self._body}
                    create = self._api.client.droplets.create
                    self._api.change(create, once=True, body=body)

    def _wait(self) -> None:
        """Wait until all wanted droplets run, with their tags; else TrainingError."""
        config, shown = self._config, None
        deadline = time.monotonic() + config.wait_minutes * 60
        absences = dict.fromkeys(self._wanted, 0)
        while True:
            ours = of_run(list_droplets(self._api), config.run, untagged=True)
            named = {name: [d for d in ours if d.name == name] for name in self._wanted}
            self._tag(ours)
            failed = self._failed_ids(ours)
            waiting: list[str] = []
            lost: list[str] = []
            for name, droplets in named.items():
                absences[name] = 0 if droplets else absences[name] + 1
                if any(d.ready and d.tags is not None for d in droplets):
                    continue
                gone = absences[name] >= _ABSENT_LISTINGS or any(
                    d.id in failed or d.status in ("off", "archive") for d in droplets
                )
                (lost if gone else waiting).append(name)
            ready = len(named) - len(waiting) - len(lost)
            if ready != shown:
                say(f"{ready} of {len(named)} droplets run")
                shown = ready
            if not waiting or time.monotonic() >= deadline:
                break
            time.sleep(config.poll_interval)
        faults = self._faults(named, waiting, lost)
        if faults:
            raise TrainingError(
                f"run {config.run} has {ready} of {len(named)} droplets: "
                f"{'; '.join(faults)}"
            )
        say(
            f"run {config.run} is up; next: `ten-dist droplets setup --run {config.run}` "
            f"and `ten-dist droplets hostfile --run {config.run} --output hostfile`"
        )

    def _faults(
        self,
        named: Mapping[str, Sequence[Droplet]],
        waiting: Sequence[str],
        lost: Sequence[str],
    ) -> list[str]:
        """What is not as it should be after waiting."""
        faults = []
        if lost:
            faults.append(f"{', '.join(lost)} could not be created or do not run")
        if waiting:
            faults.append(
                f"{', '.join(waiting)} are not there after --wait_minutes "
                f"{self._config.wait_minutes:g}"
            )
        for name, droplets in named.items():
            if len(droplets) > 1:
                ids = ", ".join(str(droplet.id) for droplet in droplets)
                faults.append(
                    f"{name} is there {len(droplets)} times, all billed ({ids}): end "
                    f"all but one with `ten-dist droplets down --run {self._config.run} "
                    "--droplet ID`"
                )
        return faults

    def _tag(self, droplets: Sequence[Droplet]) -> None:
        """Give the tags of the run to those that the API has not given them to yet."""
        assign = self._api.client.tags.assign_resources
        for droplet in droplets:
            if droplet.tags is None or droplet.tags.expires is None:
                resource = {"resource_id": str(droplet.id), "resource_type": "droplet"}
                for tag in self._tags.names():
                    self._api.change(assign, tag_id=tag, body={"resources": [resource]})

    def _failed_ids(self, droplets: Sequence[Droplet]) -> set[int]:
        """Those whose creation the API has given up."""
        new = {droplet.id for droplet in droplets if droplet.status == "new"}
        if not new:
            return set()
        # One page: the newest actions of the account.
        listing = self._api.client.actions.list
        actions = self._api.read(listing, per_page=200, page=1)["actions"]
        return {
            action["resource_id"]
            for action in actions
            if action["resource_id"] in new
            and (action["type"], action["status"]) == ("create", "errored")
        }

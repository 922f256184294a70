"""The droplets of a run, as the API lists them, and what their tags say.

The tags on the API are the record of a run: a machine that is lost, or another one, finds
every droplet by them. They are never deleted, as they cost nothing and a droplet whose
creation the API is still working on would lose them.
"""

from __future__ import annotations

import calendar
import dataclasses
import math
import re
import time
from collections.abc import Iterable
from typing import Any

from launch.droplets.api import Api
from ten_dist.config.options import at_least, more_than
from ten_dist.errors import ConfigurationError

PREFIX = "ten-dist"
_RUN = f"{PREFIX}-run-"
_EXPIRES = f"{PREFIX}-expires-"
_BUDGET = f"{PREFIX}-budget-"
# Of droplets, hours, minutes and seconds alike: more is a slip of the keyboard.
COUNT = at_least(1, most=100_000)
AMOUNT = more_than(0, most=100_000)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class RunTags:
    """What the tags of a droplet say of its run."""

    run: str
    expires: int | None
    """Seconds since 1970 after which the droplet is to be destroyed."""
    budget: float | None
    """Dollars that the run may cost, None for no limit."""

    @classmethod
    def of(cls, tags: Iterable[str]) -> RunTags | None:
        """Read the tags of a droplet; None where it is of no run."""
        # The API keeps the case in which a tag was first written, and compares without it.
        tags = [tag.lower() for tag in tags]
        runs = _values(tags, _RUN)
        if not runs:
            return None
        # Of several the most cautious: they come from different calls of `up`.
        expiries = [int(text) for text in _values(tags, _EXPIRES) if text.isdigit()]
        budgets = [int(text) for text in _values(tags, _BUDGET) if text.isdigit()]
        budget = min(budgets) / 100 if budgets else None
        return cls(runs[0], min(expiries, default=None), budget)

    def names(self) -> list[str]:
        """The tags themselves."""
        names = [PREFIX, run_tag(self.run)]
        if self.expires is not None:
            names.append(f"{_EXPIRES}{self.expires}")
        if self.budget is not None:
            names.append(f"{_BUDGET}{math.floor(self.budget * 100 + 1e-6)}")
        return names


def run_tag(run: str) -> str:
    """The tag of all droplets of a run."""
    return _RUN + run


def droplet_name(run: str, index: int) -> str:
    """Name of a run's droplet, the same in every attempt to create it."""
    return f"{PREFIX}-{run}-{index}"


def droplet_index(run: str, name: str) -> int | None:
    """The number in the name of a run's droplet; None for another name."""
    found = re.fullmatch(re.escape(f"{PREFIX}-{run}-") + "(0|[1-9][0-9]*)", name)
    return None if found is None else int(found[1])


def check_run_name(run: str) -> None:
    """Raise ConfigurationError for a name that is no part of a tag and a host name."""
    if not _NAME.fullmatch(run):
        raise ConfigurationError(
            f"--run {run}: a run's name has up to 40 characters a-z, 0-9 and -, and "
            "begins and ends with a letter or digit"
        )


def _values(tags: Iterable[str], prefix: str) -> list[str]:
    return [tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)]


@dataclasses.dataclass(frozen=True)
class Droplet:
    """A droplet; as text, its name and identifier."""

    id: int
    name: str
    status: str
    """`new` while it is made, `active`, `off` (billed all the same) or `archive`."""
    size: str
    region: str
    gpus: int
    hourly_price: float | None
    """Dollars; None where the API does not tell."""
    created: float
    """Seconds since 1970."""
    public: str | None
    """IPv4 address in the internet, once it has one."""
    private: str | None
    """IPv4 address in its VPC, once it has one."""
    tags: RunTags | None
    """What its tags say; None without those of a run."""
    tagged: bool
    """Whether it has any tags."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Droplet:
        """A droplet of the API's answers."""
        size = answer.get("size") or {}
        gpu = answer.get("gpu_info") or size.get("gpu_info") or {}
        addresses = {
            entry.get("type"): entry.get("ip_address")
            for entry in (answer.get("networks") or {}).get("v4") or []
        }
        created = time.strptime(answer["created_at"], "%Y-%m-%dT%H:%M:%SZ")
        return cls(
            id=answer["id"],
            name=answer["name"],
            status=answer["status"],
            size=answer.get("size_slug") or size.get("slug", "?"),
            region=(answer.get("region") or {}).get("slug", "?"),
            gpus=gpu.get("count") or 0,
            hourly_price=size.get("price_hourly"),
            created=calendar.timegm(created),
            public=addresses.get("public"),
            private=addresses.get("private"),
            tags=RunTags.of(answer.get("tags") or []),
            tagged=bool(answer.get("tags")),
        )

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"

    @property
    def addresses(self) -> tuple[str, str]:
        """Public and private address of one that is :attr:`ready`."""
        assert self.public is not None and self.private is not None
        return self.public, self.private

    @property
    def ready(self) -> bool:
        """Whether it runs and has both of its addresses."""
        return self.status == "active" and None not in (self.public, self.private)

    def cost(self, until: float) -> float:
        """Dollars from its creation to a time; 0 where its price is not known."""
        hours = max(0.0, until - self.created) / 3600
        return hours * (self.hourly_price or 0.0)


def list_droplets(api: Api) -> list[Droplet]:
    """All droplets of the account, those with GPUs too."""
    # Each type only by itself; tags cannot be asked for together with a type.
    found = [
        answer
        for kind in ("gpus", "droplets")
        for answer in api.pages(api.client.droplets.list, "droplets", type=kind)
    ]
    # One that appears as both is still one.
    return list({answer["id"]: Droplet.of(answer) for answer in found}.values())


def of_run(
    droplets: Iterable[Droplet], run: str, *, untagged: bool = False
) -> list[Droplet]:
    """Those with the tag of a run, in the order of their numbers.

    `untagged` adds those with a name of the run's and without any tag: the API adds tags
    after it has made a droplet.
    """

    def belongs(droplet: Droplet) -> bool:
        if droplet.tags is not None:
            return droplet.tags.run == run
        named = droplet_index(run, droplet.name) is not None
        return untagged and named and not droplet.tagged

    ours = filter(belongs, droplets)
    return sorted(ours, key=lambda d: (droplet_index(run, d.name) or 0, d.id))


def total_cost(droplets: Iterable[Droplet], until: float) -> float:
    """Dollars from each one's creation to a time."""
    return sum(droplet.cost(until) for droplet in droplets)

"""The droplets of a run, as the API lists them."""

from __future__ import annotations

import calendar
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from launch.droplets.api import Api
from launch.droplets.tags import RunTags, droplet_index

_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Droplet:
    """A droplet."""

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
        hours = max(0.0, until - self.created) / _HOUR
        return hours * (self.hourly_price or 0.0)


def list_droplets(api: Api) -> list[Droplet]:
    """All droplets of the account, those with GPUs too.

    Raises:
        ApiError, ConfigurationError: as :meth:`Api.read`.
    """
    # Each type only by itself; tags cannot be asked for together with a type.
    found = [
        answer
        for kind in ("gpus", "droplets")
        for answer in api.pages(api.client.droplets.list, "droplets", type=kind)
    ]
    # One that appears as both is still one.
    return list({answer["id"]: Droplet.of(answer) for answer in found}.values())


def of_run(droplets: Iterable[Droplet], run: str) -> list[Droplet]:
    """Those with the tag of a run, in the order of their numbers."""
    tagged = [d for d in droplets if d.tags is not None and d.tags.run == run]
    return sorted(tagged, key=lambda d: (droplet_index(run, d.name) or 0, d.id))


def untagged_of_run(droplets: Iterable[Droplet], run: str) -> list[Droplet]:
    """Those with a name of the run's but without any tag.

    The API adds tags after it has made a droplet, so there may be a moment without.
    """
    return [
        d for d in droplets if not d.tagged and droplet_index(run, d.name) is not None
    ]


def total_cost(droplets: Iterable[Droplet], until: float) -> float:
    """Dollars from each one's creation to a time."""
    return sum(droplet.cost(until) for droplet in droplets)

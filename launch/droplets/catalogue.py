"""Sizes, regions, images and ssh keys, as the API has them at this moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.droplets.api import Api
from launch.droplets.errors import ApiError
from ten_dist.errors import ConfigurationError

_NOT_FOUND = 404
_UNITS = {"gib": "GiB", "tib": "TiB"}


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of droplets."""

    slug: str
    hourly_price: float
    """Dollars."""
    gpus: int
    gpu_model: str
    vcpus: int
    memory_gib: float
    scratch: str
    """Sizes of its scratch disks, empty where it has none."""
    regions: tuple[str, ...]
    """Where it can be created now."""

    @classmethod
    def of(cls, answer: dict[str, Any], open_regions: set[str]) -> Size:
        """A size of the API's answers."""
        gpu = answer.get("gpu_info") or {}
        memory = gpu.get("vram") or {}
        disks = [
            disk.get("size") or {}
            for disk in answer.get("disk_info") or []
            if disk.get("type") == "scratch"
        ]
        model = f"{gpu.get('model', '')} {_quantity(memory)}".strip()
        return cls(
            slug=answer["slug"],
            hourly_price=float(answer["price_hourly"]),
            gpus=gpu.get("count") or 0,
            gpu_model=model,
            vcpus=answer["vcpus"],
            memory_gib=answer["memory"] / 1024,
            scratch=" + ".join(_quantity(disk) for disk in disks),
            regions=tuple(
                sorted(set(answer["regions"]) & open_regions)
                if answer.get("available", True)
                else ()
            ),
        )


def _quantity(amount: dict[str, Any]) -> str:
    if not amount.get("amount"):
        return ""
    unit = str(amount.get("unit", ""))
    return f"{amount['amount']:g} {_UNITS.get(unit, unit)}".strip()


class Catalogue:
    """What can be bought.

    Args:
        api: where from.

    Raises:
        ApiError, ConfigurationError: as :meth:`Api.read`.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        regions = api.pages(api.client.regions.list, "regions")
        self.regions = {region["slug"]: region for region in regions}
        """The API's regions by their slugs."""
        self._open = {
            slug for slug, region in self.regions.items() if region["available"]
        }
        sizes = [
            Size.of(answer, self._open)
            for answer in api.pages(api.client.sizes.list, "sizes")
        ]
        self.sizes = {
            size.slug: size
            for size in sorted(sizes, key=lambda s: (s.hourly_price, s.slug))
        }
        """Sizes by their slugs, the cheapest first."""

    def size(self, slug: str) -> Size:
        """A size.

        Raises:
            ConfigurationError: there is none; the message names those with GPUs.
        """
        if slug not in self.sizes:
            with_gpus = [size.slug for size in self.sizes.values() if size.gpus]
            raise ConfigurationError(
                f"--size {slug} is unknown to the API; those with GPUs are "
                f"{', '.join(with_gpus) or 'none'}"
            )
        return self.sizes[slug]

    def size_in(self, slug: str, region: str) -> Size:
        """A size that can be created in a region now.

        Raises:
            ConfigurationError: the size or the region is unknown, or not available; the
                message names the alternatives.
        """
        size = self.size(slug)
        self.check_region(region)
        if region not in size.regions:
            elsewhere = ", ".join(size.regions) or "no region at the moment"
            others = [
                s.slug for s in self.sizes.values() if s.gpus and region in s.regions
            ]
            raise ConfigurationError(
                f"--size {slug} is not available in --region {region}, but in "
                f"{elsewhere}; with GPUs, {region} has {', '.join(others) or 'nothing'}"
            )
        return size

    def check_region(self, region: str) -> None:
        """Find out whether there is such a region.

        Raises:
            ConfigurationError: there is none, or it takes no droplets at the moment.
        """
        if region not in self._open:
            what = "is closed" if region in self.regions else "is unknown to the API"
            raise ConfigurationError(
                f"--region {region} {what}; there are {', '.join(sorted(self._open))}"
            )

    def image(self, name: str, region: str) -> str | int:
        """The image of a slug or number, as a droplet's request wants it.

        Raises:
            ConfigurationError: there is none, or not in the region.
        """
        identifier = int(name) if name.isdigit() else name
        images = self._api.client.images
        try:
            image = self._api.read(images.get, image_id=identifier)["image"]
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            there = self._api.pages(images.list, "images")
            slugs = [
                i["slug"] for i in there if i.get("slug") and region in i["regions"]
            ]
            raise ConfigurationError(
                f"--image {name} is unknown to the API; {region} has "
                f"{', '.join(sorted(slugs)) or 'none with a name'}"
            ) from None
        # Images that are made of others may list no region.
        if image.get("regions") and region not in image["regions"]:
            raise ConfigurationError(
                f"--image {name} is not in --region {region}, but in "
                f"{', '.join(sorted(image['regions']))}"
            )
        return identifier

    def ssh_keys(self, names: Sequence[str]) -> list[int]:
        """Identifiers of the account's ssh keys with these names, numbers or fingerprints.

        Raises:
            ConfigurationError: one is unknown, or a name is that of several.
        """
        there = self._api.pages(self._api.client.ssh_keys.list, "ssh_keys")
        found = []
        for name in names:
            matching = [
                key["id"]
                for key in there
                if name in (str(key["id"]), key["name"], key["fingerprint"])
            ]
            if len(matching) != 1:
                what = "is that of several" if matching else "is unknown to the account"
                known = ", ".join(f"{key['name']} ({key['id']})" for key in there)
                raise ConfigurationError(
                    f"--ssh_key {name} {what}; it has {known or 'none: add one to it'}"
                )
            found.append(matching[0])
        return found

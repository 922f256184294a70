"""Sizes, regions, images and ssh keys, as the API has them at this moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.droplets.api import Api
from launch.droplets.errors import NOT_FOUND, ApiError
from ten_dist.errors import ConfigurationError

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
        disks = [
            _quantity(disk.get("size"))
            for disk in answer.get("disk_info") or []
            if disk.get("type") == "scratch"
        ]
        available = answer["regions"] if answer.get("available", True) else ()
        return cls(
            slug=answer["slug"],
            hourly_price=float(answer["price_hourly"]),
            gpus=gpu.get("count") or 0,
            gpu_model=f"{gpu.get('model', '')} {_quantity(gpu.get('vram'))}".strip(),
            vcpus=answer["vcpus"],
            memory_gib=answer["memory"] / 1024,
            scratch=" + ".join(disks),
            regions=tuple(sorted(open_regions.intersection(available))),
        )


def _quantity(amount: dict[str, Any] | None) -> str:
    if not amount or not amount.get("amount"):
        return ""
    unit = str(amount.get("unit", ""))
    return f"{amount['amount']:g} {_UNITS.get(unit, unit)}".strip()


class Catalogue:
    """What can be bought."""

    def __init__(self, api: Api) -> None:
        self._api = api
        regions = api.pages(api.client.regions.list, "regions")
        self._regions = {region["slug"]: region["available"] for region in regions}
        self._open = {slug for slug, is_open in self._regions.items() if is_open}
        answers = api.pages(api.client.sizes.list, "sizes")
        sizes = [Size.of(answer, self._open) for answer in answers]
        sizes.sort(key=lambda size: (size.hourly_price, size.slug))
        self.sizes = {size.slug: size for size in sizes}
        """Sizes by their slugs, the cheapest first."""

    def size(self, slug: str) -> Size:
        """A size; a ConfigurationError where there is none names those with GPUs."""
        if slug not in self.sizes:
            with_gpus = [size.slug for size in self.sizes.values() if size.gpus]
            raise ConfigurationError(
                f"--size {slug} is unknown to the API; those with GPUs are "
                f"{', '.join(with_gpus) or 'none'}"
            )
        return self.sizes[slug]

    def size_in(self, slug: str, region: str) -> Size:
        """A size that can be created in a region now; a ConfigurationError where the size
        or the region is unknown or not available names the alternatives."""
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
        """Raise ConfigurationError for a region that is unknown or takes no droplets now."""
        if region not in self._open:
            what = "is closed" if region in self._regions else "is unknown to the API"
            raise ConfigurationError(
                f"--region {region} {what}; there are {', '.join(sorted(self._open))}"
            )

    def image(self, name: str, region: str) -> str | int:
        """The image of a slug or number, as a droplet's request has it; ConfigurationError
        for one that is unknown, or not in the region."""
        identifier = int(name) if name.isdigit() else name
        images = self._api.client.images
        try:
            image = self._api.read(images.get, image_id=identifier)["image"]
        except ApiError as error:
            if error.status != NOT_FOUND:
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
        """Identifiers of the account's ssh keys with these names, numbers or fingerprints;
        ConfigurationError for one that is unknown, or a name of several."""
        there = self._api.pages(self._api.client.ssh_keys.list, "ssh_keys")
        found = []
        for name in map(str.strip, names):
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

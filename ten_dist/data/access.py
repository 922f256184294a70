"""How a command reads token sets behind URLs: the options of the cache, and what they say.

Names, defaults and help are those of `ten-dist train`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ten_dist.config.command_line import add_options
from ten_dist.config.training import TrainingConfig, check_cache_options
from ten_dist.data import Manifest, RemoteAccess, ShardCache, is_url
from ten_dist.data.storage import Location
from ten_dist.errors import ConfigurationError


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add `--data_cache` and `--data_cache_gigabytes`."""
    add_options(parser, TrainingConfig, only=("data_cache", "data_cache_gigabytes"))


def access_of(
    arguments: argparse.Namespace, addresses: Iterable[str | None]
) -> RemoteAccess:
    """What the options of :func:`add_cache_options` ask for.

    Raises:
        ConfigurationError: as :func:`chosen_cache`.
    """
    directory = getattr(arguments, "data_cache", None)
    gigabytes = getattr(arguments, "data_cache_gigabytes", None)
    return RemoteAccess(cache=chosen_cache(directory, gigabytes, addresses))


def chosen_cache(
    directory: str | None, gigabytes: float | None, addresses: Iterable[str | None]
) -> ShardCache | None:
    """The cache for the sets at some addresses; None where no folder is given.

    Raises:
        ConfigurationError: the limit is out of range or lacks a folder; or none of the
            sets is behind a URL, so that a cache would keep nothing.
    """
    check_cache_options(directory, gigabytes)
    if directory is None:
        return None
    if not any(is_url(address) for address in addresses if address):
        raise ConfigurationError(
            "--data_cache has no effect with local --data: leave it out"
        )
    limit = None if gigabytes is None else int(gigabytes * 1e9)
    return ShardCache(Path(directory).absolute(), limit)


def load_set(address: str | Location, access: RemoteAccess) -> Manifest:
    """The manifest of a token set, whose shards the cache can hold where there is one.

    Raises:
        ConfigurationError: the cache cannot.
        DataError: as :meth:`Manifest.load`.
    """
    manifest = Manifest.load(address, access)
    if access.cache is not None and is_url(manifest.directory):
        access.cache.check(max(shard.bytes for shard in manifest.shards))
    return manifest

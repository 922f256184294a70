"""How token sets behind URLs are read: the cache that the options ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ten_dist.config.training import CacheOptions
from ten_dist.data import Manifest, RemoteAccess, ShardCache, is_url
from ten_dist.data.storage import Location
from ten_dist.errors import ConfigurationError


def access_of(options: CacheOptions, addresses: Iterable[str | None]) -> RemoteAccess:
    """What the options ask for.

    Raises:
        ConfigurationError: as :func:`chosen_cache`.
    """
    return RemoteAccess(cache=chosen_cache(options, addresses))


def chosen_cache(
    options: CacheOptions, addresses: Iterable[str | None]
) -> ShardCache | None:
    """The cache for the sets at some addresses; None where no folder is given.

    Raises:
        ConfigurationError: none of the sets is behind a URL, so that a cache would keep
            nothing.
    """
    directory, gigabytes = options.data_cache, options.data_cache_gigabytes
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
    if access.cache is not None:
        check_cache(access.cache, [manifest])
    return manifest


def check_cache(cache: ShardCache, sets: Iterable[Manifest]) -> None:
    """Find out, without writing, whether a cache can hold the shards behind URLs.

    Raises:
        ConfigurationError: it cannot, as :meth:`ShardCache.check`.
    """
    remote = [found for found in sets if is_url(found.directory)]
    if remote:
        cache.check(max(shard.bytes for found in remote for shard in found.shards))

"""Destroying droplets: those of a run, and those whose time or money is up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence

from launch.droplets.api import Api, ApiConfig
from launch.droplets.errors import ApiError
from launch.droplets.fleet import (
    Droplet,
    list_droplets,
    of_run,
    total_cost,
    untagged_of_run,
)
from launch.droplets.network import remove_network
from launch.droplets.tags import RunTags
from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError, TrainingError

_NOT_FOUND = 404
WAIT_MINUTES = 10.0
"""Minutes to wait until what was destroyed is not listed any more."""
POLL_SECONDS = 5.0
"""Seconds between looks."""


def destroy(
    api: Api,
    find: Callable[[], list[Droplet]],
    wait_seconds: float,
    poll_interval: float,
) -> list[Droplet]:
    """Destroy what `find` finds, until it finds nothing more.

    What could not be destroyed is tried again: the API refuses to while a droplet is
    still being created, for instance. One that fails does not keep the others alive.

    Args:
        api: where.
        find: lists the droplets that are to go.
        wait_seconds: how long to go on.
        poll_interval: seconds between two listings.

    Returns:
        Survivors.

    Raises:
        ApiError, ConfigurationError: they cannot be listed.
    """
    deadline = time.monotonic() + wait_seconds
    told: set[int] = set()
    left = find()
    while left:
        for droplet in left:
            try:
                api.change(api.client.droplets.destroy, droplet_id=droplet.id)
            except ApiError as error:
                if error.status != _NOT_FOUND:
                    warn(f"{droplet.name} ({droplet.id}) is not destroyed yet: {error}")
                continue
            if droplet.id not in told and not api.config.dry_run:
                say(f"destroying {droplet.name} ({droplet.id})")
                told.add(droplet.id)
        if api.config.dry_run:
            return []
        left = find()
        if time.monotonic() >= deadline:
            break
        if left:
            time.sleep(poll_interval)
    return left


def down(
    api: Api,
    run: str,
    ids: Sequence[int] = (),
    *,
    wait_minutes: float = WAIT_MINUTES,
    poll_interval: float = POLL_SECONDS,
) -> None:
    """Destroy the droplets of a run and its network, or some of the droplets.

    Raises:
        ConfigurationError: one of `ids` is no droplet of the run.
        TrainingError: some are still there.
        ApiError: the API fails.
    """
    everything = list_droplets(api)
    known = {droplet.id for droplet in of_run(everything, run)}
    for wanted in ids:
        if wanted not in known:
            raise ConfigurationError(
                f"--droplet {wanted} is none of run {run}, which has "
                f"{', '.join(map(str, sorted(known))) or 'none'}"
            )
    for droplet in untagged_of_run(everything, run):
        warn(
            f"{droplet.name} ({droplet.id}) has a name of run {run} but not its tag, and "
            "is left alone"
        )

    def find() -> list[Droplet]:
        there = of_run(list_droplets(api), run)
        return [droplet for droplet in there if not ids or droplet.id in ids]

    survivors = destroy(api, find, wait_minutes * 60, poll_interval)
    if not survivors and not api.config.dry_run:
        # What an `up` that was cut off has asked for may be listed only now.
        time.sleep(poll_interval)
        survivors = destroy(api, find, wait_minutes * 60, poll_interval)
    if survivors:
        names = ", ".join(f"{droplet.name} ({droplet.id})" for droplet in survivors)
        raise TrainingError(
            f"{len(survivors)} droplets of run {run} are still there and billed: "
            f"{names}; the same command goes on"
        )
    if not ids:
        remove_network(api, run)
    if not api.config.dry_run:
        what = "of these droplets" if ids else f"of run {run}"
        say(f"nothing {what} is listed any more")


def overdue(droplets: Iterable[Droplet], now: float) -> dict[int, str]:
    """Why droplets are to be destroyed, by their identifiers.

    Args:
        droplets: of any runs; those without the tag of one are never among the result.
        now: seconds since 1970.
    """
    runs: dict[str, list[tuple[Droplet, RunTags]]] = {}
    for droplet in droplets:
        if droplet.tags is not None:
            runs.setdefault(droplet.tags.run, []).append((droplet, droplet.tags))
    reasons = {}
    for run, members in runs.items():
        budgets = [tags.budget for _, tags in members if tags.budget is not None]
        budget = min(budgets, default=None)
        cost = total_cost([droplet for droplet, _ in members], now)
        for droplet, tags in members:
            expires = tags.expires
            if expires is not None and now >= expires:
                reasons[droplet.id] = f"expired {(now - expires) / 3600:,.1f} hours ago"
            elif budget is not None and cost >= budget:
                reasons[droplet.id] = (
                    f"run {run} has cost ${cost:,.2f} of ${budget:,.2f}"
                )
    return reasons


def reap(
    api: Api,
    run: str | None = None,
    *,
    wait_minutes: float = WAIT_MINUTES,
    poll_interval: float = POLL_SECONDS,
) -> int:
    """Destroy every droplet whose time or whose run's money is up.

    Args:
        api: where.
        run: only those of this run.
        wait_minutes: how long to go on.
        poll_interval: seconds between looks.

    Returns:
        How many were to go.

    Raises:
        TrainingError: some are still there.
        ApiError, ConfigurationError: the API fails.
    """
    seen: dict[int, Droplet] = {}
    unlimited: set[int] = set()

    def find() -> list[Droplet]:
        there = list_droplets(api)
        there = there if run is None else of_run(there, run)
        _tell_unlimited(there, unlimited)
        reasons = overdue(there, api.now())
        for droplet in there:
            if droplet.id in reasons and droplet.id not in seen:
                say(f"{droplet.name} ({droplet.id}): {reasons[droplet.id]}")
                seen[droplet.id] = droplet
        # A run costs less once some of it has gone, which must not save the others.
        return [droplet for droplet in there if droplet.id in seen]

    survivors = destroy(api, find, wait_minutes * 60, poll_interval)
    if survivors:
        names = ", ".join(f"{droplet.name} ({droplet.id})" for droplet in survivors)
        raise TrainingError(f"still there and billed: {names}; reap again")
    if seen:
        left = {d.tags.run for d in list_droplets(api) if d.tags is not None}
        gone = {d.tags.run for d in seen.values() if d.tags is not None}
        for ended in sorted(gone - left):
            remove_network(api, ended)
    return len(seen)


def _tell_unlimited(droplets: Iterable[Droplet], told: set[int]) -> None:
    """Name the droplets whose limits cannot be held, except those in `told`."""
    for droplet in droplets:
        tags = droplet.tags
        if tags is None or droplet.id in told:
            continue
        name = f"{droplet.name} ({droplet.id})"
        if tags.expires is None:
            warn(
                f"{name} has lost its expiry: it is reaped for its cost only, if at all"
            )
            told.add(droplet.id)
        if tags.budget is not None and droplet.hourly_price is None:
            warn(f"{name} has no price in the API: it is not part of its run's cost")
            told.add(droplet.id)


def reap_expired(config: ApiConfig, run: str | None = None) -> int:
    """As :func:`reap`, with a connection of its own."""
    with contextlib.closing(Api(config)) as api:
        return reap(api, run)

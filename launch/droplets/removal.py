"""Destroying droplets: those of a run, and those whose time or money is up."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, ClassVar

from launch.droplets.api import Api, ApiConfig
from launch.droplets.errors import NOT_FOUND, ApiError
from launch.droplets.fleet import AMOUNT, Droplet, list_droplets, of_run, total_cost
from launch.droplets.network import remove_network
from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import Options, at_least
from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError, TrainingError

_SECONDS_TO_END = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience(Options):
    """How long to wait until what was destroyed is not listed any more."""

    wait_minutes: Annotated[float, AMOUNT] = 10.0
    """Give up after so many minutes."""
    poll_interval: Annotated[float, AMOUNT] = 5.0
    """Seconds between looks at the droplets."""


def destroy(
    api: Api, find: Callable[[], list[Droplet]], patience: Patience
) -> list[Droplet]:
    """Destroy what `find` lists, until it lists nothing more; returns the survivors.

    What could not be destroyed is tried again: the API refuses to while a droplet is
    still being created, for instance. One that fails does not keep the others alive.

    Raises:
        ApiError, ConfigurationError: they cannot be listed.
    """
    deadline = time.monotonic() + patience.wait_minutes * 60
    told: set[int] = set()
    left = find()
    while left:
        for droplet in left:
            try:
                api.change(api.client.droplets.destroy, droplet_id=droplet.id)
            except ApiError as error:
                if error.status != NOT_FOUND:
                    warn(f"{droplet} is not destroyed yet: {error}")
                continue
            if droplet.id not in told and not api.config.dry_run:
                say(f"destroying {droplet}")
                told.add(droplet.id)
        if api.config.dry_run:
            return []
        left = find()
        if time.monotonic() >= deadline:
            break
        if left:
            time.sleep(patience.poll_interval)
    return left


def down(api: Api, run: str, ids: Sequence[int], patience: Patience) -> None:
    """Destroy the droplets of a run and its network, or only the droplets in `ids`.

    Raises:
        ConfigurationError: one of `ids` is no droplet of the run.
        TrainingError: some are still there.
        ApiError: the API fails.
    """
    ours = of_run(list_droplets(api), run, untagged=True)
    known = {droplet.id for droplet in ours if droplet.tagged}
    for wanted in ids:
        if wanted not in known:
            raise ConfigurationError(
                f"--droplet {wanted} is none of run {run}, which has "
                f"{', '.join(map(str, sorted(known))) or 'none'}"
            )
    for droplet in ours:
        if not droplet.tagged:
            warn(
                f"{droplet} has a name of run {run} but not its tag, and is left alone"
            )

    def find() -> list[Droplet]:
        there = of_run(list_droplets(api), run)
        return [droplet for droplet in there if not ids or droplet.id in ids]

    survivors = destroy(api, find, patience)
    if not survivors and not api.config.dry_run:
        # What an `up` that was cut off has asked for may be listed only now.
        time.sleep(patience.poll_interval)
        survivors = destroy(api, find, patience)
    if survivors:
        raise TrainingError(
            f"{len(survivors)} droplets of run {run} are still there and billed: "
            f"{', '.join(map(str, survivors))}; the same command goes on"
        )
    if not ids:
        remove_network(api, run)
    if not api.config.dry_run:
        what = "of these droplets" if ids else f"of run {run}"
        say(f"nothing {what} is listed any more")


def overdue(droplets: Sequence[Droplet], now: float) -> dict[int, str]:
    """Why droplets are to be destroyed, by their identifiers; `now` is in seconds since 1970.

    Those without the tag of a run are never among them.
    """
    reasons = {}
    for run in {droplet.tags.run for droplet in droplets if droplet.tags is not None}:
        members = of_run(droplets, run)
        cost = total_cost(members, now)
        tags = [droplet.tags for droplet in members if droplet.tags is not None]
        budgets = [each.budget for each in tags if each.budget is not None]
        for droplet, own in zip(members, tags):
            if own.expires is not None and now >= own.expires:
                hours = (now - own.expires) / 3600
                reasons[droplet.id] = f"expired {hours:,.1f} hours ago"
            elif budgets and cost >= min(budgets):
                spent = f"${cost:,.2f} of ${min(budgets):,.2f}"
                reasons[droplet.id] = f"run {run} has cost {spent}"
    return reasons


def reap(api: Api, run: str | None = None, patience: Patience = Patience()) -> int:
    """Destroy all droplets, of any run or of `run`, that have expired or whose run has cost
    its budget; returns how many there were.

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
                say(f"{droplet}: {reasons[droplet.id]}")
                seen[droplet.id] = droplet
        # A run costs less once some of it has gone, which must not save the others.
        return [droplet for droplet in there if droplet.id in seen]

    survivors = destroy(api, find, patience)
    if survivors:
        names = ", ".join(map(str, survivors))
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
        if tags.expires is None:
            warn(
                f"{droplet} has lost its expiry: it is reaped for its cost only, if at "
                "all"
            )
            told.add(droplet.id)
        if tags.budget is not None and droplet.hourly_price is None:
            warn(f"{droplet} has no price in the API: it is not part of its run's cost")
            told.add(droplet.id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReapingConfig(Options):
    """Whether to reap; each field is an option of `ten-dist supervise` and `launch`."""

    GROUP: ClassVar[str] = "supervision"

    reap_droplets: Annotated[float, at_least(0, most=LONGEST_SECONDS // 60)] = 0.0
    """Destroy DigitalOcean droplets that have expired or cost their budget, every N
    minutes, see `ten-dist droplets`; 0 is never."""


@contextlib.contextmanager
def reaping(config: ReapingConfig) -> Iterator[None]:
    """Reap droplets every few minutes in a thread beside a block, if the options ask for it.

    A failure is said and does not end it.

    Raises:
        ConfigurationError: there is no token for it, or no PyDo.
    """
    if not config.reap_droplets:
        yield
        return
    # What is missing is said now rather than in the thread.
    Api(ApiConfig()).close()
    stopped = threading.Event()

    def run() -> None:
        while True:
            try:
                with contextlib.closing(Api(ApiConfig())) as api:
                    reap(api)
            except Exception as error:  # noqa: BLE001 - the next time may be better
                warn(f"reaping droplets failed: {error}")
            if stopped.wait(config.reap_droplets * 60):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        # What is under way has a moment to end.
        thread.join(_SECONDS_TO_END)

"""What the hosts have reported, and a problem found in it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from launch.hosts import Host

ERROR, WARNING = "error", "warning"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a host."""

    host: Host | None
    """Which one; None where it is with all of them."""
    what: str
    """What is wrong."""
    cure: str
    """What to do."""
    severity: str = ERROR
    """`error` where a run would fail or compute something else, or `warning`."""


@dataclasses.dataclass(frozen=True, eq=False)
class HostReport:
    """What a host has said of itself."""

    host: Host
    facts: Mapping[str, Any]
    """Sections of the report, see :mod:`launch.preflight.probe`. One that failed there has
    the key `error`; one that was not reached is missing."""
    clock_offset: float
    """Seconds that the host's clock is ahead of the one here, at least; negative where it
    is behind, 0 where it may be right."""

    def section(self, name: str) -> Any:
        """A section; None where there is none or it failed."""
        found = self.facts.get(name)
        return None if isinstance(found, dict) and "error" in found else found


@dataclasses.dataclass(frozen=True)
class NetworkMeasurement:
    """An all-reduce across the hosts."""

    backend: str
    ranks: int
    latency_seconds: float
    """Median time of an all-reduce of one number."""
    bytes: int
    """Size of the largest all-reduce."""
    bus_bytes_per_second: float
    """Bytes that each rank sent in a second during it, 2 (n - 1) / n times its size: to
    be compared with the speed of the link, whatever the number of ranks."""


def differing(
    reports: Sequence[HostReport], value_of: Callable[[HostReport], Hashable | None]
) -> list[tuple[HostReport, HostReport]]:
    """The hosts that have another value than most, each with a host that has theirs.

    Args:
        reports: of the hosts.
        value_of: a host's value; None where it has none, which is passed over.

    Returns:
        Pairs of a host that differs and the one that stands for most, which is the first
        host where there are as many with another value.
    """
    values = [(value_of(report), report) for report in reports]
    known = [(value, report) for value, report in values if value is not None]
    if not known:
        return []
    # In the order of the hosts, so that the first of equals wins.
    counts = collections.Counter(value for value, _ in known)
    common = max(counts, key=counts.__getitem__)
    typical = next(report for value, report in known if value == common)
    return [(report, typical) for value, report in known if value != common]

"""What the hosts have reported, and a problem found in it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from launch.hosts import Host

ERROR, WARNING = "error", "warning"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a host, or with None for all of them, and what to do."""

    host: Host | None
    what: str
    cure: str
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

    def problem(self, what: str, cure: str, severity: str = ERROR) -> Problem:
        """A problem of the host."""
        return Problem(self.host, what, cure, severity)


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


def unlike(
    reports: Sequence[HostReport],
    value_of: Callable[[HostReport], str | None],
    what: str,
    cure: str,
    severity: str = ERROR,
) -> Iterator[Problem]:
    """A problem for each host that has another value than most, see :func:`differing`.

    In `what` and `cure`, {mine} stands for its value, {theirs} for that of most, and
    {host} for a host that has it.
    """
    for report, typical in differing(reports, value_of):
        words = {"mine": value_of(report), "theirs": value_of(typical)}
        words["host"] = str(typical.host)
        yield report.problem(what.format(**words), cure.format(**words), severity)


def differing(
    reports: Sequence[HostReport], value_of: Callable[[HostReport], Hashable | None]
) -> list[tuple[HostReport, HostReport]]:
    """The hosts that have another value than most, each with a host that has theirs.

    A host without a value, for which `value_of` is None, is passed over. Where two values
    are as frequent, that of the first host counts.
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

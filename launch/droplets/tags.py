"""What a droplet's tags say: its run, when it expires, what the run may cost.

The tags on the API are the record of a run: a machine that is lost, or another one, finds
every droplet by them. They are never deleted, as they cost nothing and a droplet whose
creation the API is still working on would lose them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from ten_dist.errors import ConfigurationError

PREFIX = "ten-dist"
_RUN = f"{PREFIX}-run-"
_EXPIRES = f"{PREFIX}-expires-"
_BUDGET = f"{PREFIX}-budget-"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class RunTags:
    """The tags of a run's droplets."""

    run: str
    expires: int | None
    """Seconds since 1970 after which the droplet is to be destroyed."""
    budget: float | None
    """Dollars that the run may cost, None for no limit."""

    @classmethod
    def of(cls, tags: Iterable[str]) -> RunTags | None:
        """What the tags of a droplet say; None where it is of no run."""
        tags = list(tags)
        runs = _values(tags, _RUN)
        if not runs:
            return None
        # Of several the most cautious: they come from different calls of `up`.
        expiries = [int(text) for text in _values(tags, _EXPIRES) if text.isdigit()]
        budgets = [int(text) for text in _values(tags, _BUDGET) if text.isdigit()]
        return cls(
            runs[0],
            min(expiries, default=None),
            min(budgets) / 100 if budgets else None,
        )

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
    """Find out whether a run can have this name.

    Raises:
        ConfigurationError: it would not do as a tag or in a host name.
    """
    if not _NAME.fullmatch(run):
        raise ConfigurationError(
            f"--run {run}: a run's name has up to 40 characters a-z, 0-9 and -, and "
            "begins and ends with a letter or digit"
        )


def _values(tags: Iterable[str], prefix: str) -> list[str]:
    # The API keeps the case in which a tag was first written, and does not tell them apart.
    lower = [tag.lower() for tag in tags]
    return [tag[len(prefix) :] for tag in lower if tag.startswith(prefix)]

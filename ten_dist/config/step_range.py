"""Steps of `--profile_steps FIRST:LAST`."""

from __future__ import annotations

import dataclasses
import re

from ten_dist.errors import ConfigurationError

_MOST_STEPS = 100
"""Events are kept in memory until they are written, thousands of them a step."""


@dataclasses.dataclass(frozen=True)
class StepRange:
    """Steps from 1, both ends included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """Read what the option gives.

        Raises:
            ConfigurationError: it is not a range of steps, or one of too many.
        """
        match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
        if match is None:
            raise ConfigurationError(
                f"--profile_steps must be FIRST:LAST, such as 10:13, not {text!r}"
            )
        found = cls(int(match[1]), int(match[2]))
        if not 1 <= found.first <= found.last:
            raise ConfigurationError(
                f"--profile_steps {text}: steps count from 1, and the first must not be "
                "after the last"
            )
        if found.last - found.first >= _MOST_STEPS:
            raise ConfigurationError(
                f"--profile_steps {text} is more than {_MOST_STEPS} steps, whose events "
                "are kept in memory: profile fewer"
            )
        return found

    def check_within(self, steps: int) -> None:
        """Raise a ConfigurationError where a run of so many steps has not all of them."""
        if self.last > steps:
            raise ConfigurationError(
                f"--profile_steps {self.first}:{self.last} is beyond the run, which has "
                f"{steps} steps"
            )

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

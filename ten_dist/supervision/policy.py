"""What to do when a job has ended: the rules, without any process."""

from __future__ import annotations

import collections
import dataclasses
from typing import Annotated, ClassVar, Literal

from ten_dist.config.options import SECONDS, Options, at_least
from ten_dist.errors import EXIT_CONFIGURATION_ERROR, EXIT_STOPPED


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisionConfig(Options):
    """When to restart and when to give up; each field is an option of
    `ten-dist supervise`."""

    GROUP: ClassVar[str] = "supervision"

    max_restarts: Annotated[int, at_least(0)] = 10
    """Give up after N restarts in a row without a new checkpoint."""
    max_failures_per_step: Annotated[int, at_least(1)] = 3
    """Give up when the same step has failed N times."""
    backoff: Annotated[float, SECONDS] = 10.0
    """Seconds before a restart, doubled with every restart in a row without a new
    checkpoint."""
    max_backoff: Annotated[float, SECONDS] = 600.0
    """Most seconds before a restart."""
    grace: Annotated[float, SECONDS] = 60.0
    """Seconds that the job has to save and end after a signal, before it is killed."""
    keep_lines: Annotated[int, at_least(0)] = 50
    """Last lines of the job's output to show and log with a failure."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do next."""

    action: Literal["refused", "restart", "give up"]
    reason: str
    delay: float = 0.0
    """Seconds to wait before a restart."""


class Policy:
    """Decides after each start, from the results of all of them.

    Args:
        config: the limits.
        checkpoint_step: steps of the newest checkpoint before the first start.
    """

    def __init__(self, config: SupervisionConfig, checkpoint_step: int) -> None:
        self._config = config
        self._checkpoint_step = checkpoint_step
        self._failures: collections.Counter[int] = collections.Counter()
        self.restarts = 0
        """Restarts since a checkpoint was last saved."""

    def decide(
        self, status: int, failed_step: int | None, checkpoint_step: int
    ) -> Decision:
        """What to do after a start that did not complete the run, and was not told to stop.

        Args:
            status: exit status; -N where signal N ended it.
            failed_step: the step after the last one that was done, from 1; None where the
                job ended in its start-up.
            checkpoint_step: steps of the newest checkpoint; 0 where there is none.
        """
        config = self._config
        if status == EXIT_CONFIGURATION_ERROR:
            return Decision("refused", "the job refuses its options or its data")
        if checkpoint_step > self._checkpoint_step:
            self._checkpoint_step = checkpoint_step
            self.restarts = 0
            for step in [step for step in self._failures if step <= checkpoint_step]:
                del self._failures[step]
        if failed_step is not None and status != EXIT_STOPPED:
            step = failed_step
            self._failures[step] += 1
            if self._failures[step] >= config.max_failures_per_step:
                return Decision(
                    "give up",
                    f"step {step:,} has failed {self._failures[step]} times "
                    f"(--max_failures_per_step {config.max_failures_per_step})",
                )
        if self.restarts >= config.max_restarts:
            return Decision(
                "give up",
                f"{self.restarts} restarts in a row have saved no new checkpoint "
                f"(--max_restarts {config.max_restarts})",
            )
        # Beyond 2^30 a float would overflow, far above any --max_backoff.
        delay = config.backoff * 2 ** min(self.restarts, 30)
        self.restarts += 1
        return Decision(
            "restart",
            f"restart {self.restarts} of {config.max_restarts} without a new checkpoint",
            min(delay, config.max_backoff),
        )

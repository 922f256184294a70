"""How a request to the API fails, and what may be done about it."""

from __future__ import annotations

from ten_dist.errors import TrainingError

TOKEN_VARIABLES = ("DIGITALOCEAN_TOKEN", "DIGITALOCEAN_ACCESS_TOKEN")
"""Environment variables that may hold the token; the first one that is set counts."""
RATE_LIMITED = 429
NOT_FOUND = 404
# Below 500, those that the same request may not get again: timeout, too early, too many.
_PASSING = (408, 425, RATE_LIMITED)


class ApiError(TrainingError):
    """A request that was refused, or that got no usable answer."""

    def __init__(
        self, message: str, status: int | None = None, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""
        self.wait = wait
        """Seconds after which the API wants the next attempt, where it says so."""

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status is None or self.status >= 500 or self.status in _PASSING

    @property
    def unknown_outcome(self) -> bool:
        """Whether the API may have done what was asked."""
        return self.passing and self.status != RATE_LIMITED


class NotSent(Exception):
    """A request that a dry run shows instead of sending it; the message is the request."""

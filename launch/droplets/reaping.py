"""Destroying droplets whose time or money is up, beside whatever else a process does."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING, Annotated, ClassVar

from launch.droplets.api import Api, ApiConfig
from launch.droplets.removal import reap_expired
from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import Options, at_least
from ten_dist.console import warn

if TYPE_CHECKING:
    from typing import Self

_SECONDS_TO_END = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReapingConfig(Options):
    """Whether to reap; each field is an option of `ten-dist supervise` and `launch`."""

    GROUP: ClassVar[str] = "supervision"

    reap_droplets: Annotated[float, at_least(0, most=LONGEST_SECONDS // 60)] = 0.0
    """Destroy DigitalOcean droplets that have expired or cost their budget, every N
    minutes, see `ten-dist droplets`; 0 is never."""


def reaping(config: ReapingConfig) -> contextlib.AbstractContextManager[object]:
    """Reap droplets beside a block, if the options ask for it.

    Raises:
        ConfigurationError: there is no token for it, or no PyDo.
    """
    if not config.reap_droplets:
        return contextlib.nullcontext()
    return Reaper(config.reap_droplets, ApiConfig())


class Reaper:
    """Reaps every few minutes in a thread, until it is told to stop; a context manager.

    A failure is said and does not end it.

    Args:
        minutes: between two times.
        config: how the API is reached.

    Raises:
        ConfigurationError: there is no token or PyDo.
    """

    def __init__(self, minutes: float, config: ApiConfig) -> None:
        # What is missing is said now rather than in the thread.
        Api(config).close()
        self._config = config
        self._seconds = minutes * 60
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # What is under way has a moment to end.
        self._thread.join(_SECONDS_TO_END)

    def _run(self) -> None:
        while True:
            try:
                reap_expired(self._config)
            except Exception as error:  # noqa: BLE001 - the next time may be better
                warn(f"reaping droplets failed: {error}")
            if self._stopped.wait(self._seconds):
                return

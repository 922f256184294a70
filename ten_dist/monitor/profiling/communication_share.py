"""What share of a step a rank communicates, measured in one step of many."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from ten_dist.console import warn
from ten_dist.monitor.profiling.step_profiler import start_profile
from ten_dist.monitor.profiling.table import COMMUNICATION, kind_of


class CommunicationShare:
    """Traces every so many steps one, for the time in which collectives run.

    That of a GPU is the time of their kernels, whether or not it computes meanwhile; that of
    a processor the time of their operators, waiting for other ranks included. Nothing that
    goes wrong here ends a run.

    Args:
        interval: steps between two that are traced.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._profile: profile | None = None

    def begin_step(self, step: int) -> None:
        """Say that a step begins."""
        if step % self._interval:
            return
        try:
            self._profile = start_profile()
        except RuntimeError as error:
            self._give_up(error)

    def end_step(self, seconds: float) -> dict[str, float]:
        """Say that the step is done.

        Args:
            seconds: that it took.

        Returns:
            `communication_share` of a step that was traced.
        """
        running, self._profile = self._profile, None
        if running is None:
            return {}
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            running.stop()
            spent = _communicating(list(running.events()))
        except RuntimeError as error:
            self._give_up(error)
            return {}
        return {"communication_share": min(1.0, spent / seconds)}

    def _give_up(self, error: Exception) -> None:
        self._interval = 1 << 62
        reason = " ".join(str(error).split())
        warn(f"the share of communication is not measured any more: {reason}")


def _communicating(events: Iterable[FunctionEvent]) -> float:
    """Seconds in which at least one collective ran."""
    found = [event for event in events if kind_of(event.name) == COMMUNICATION]
    kernels = [event for event in found if event.device_type == DeviceType.CUDA]
    ranges = sorted(
        (event.time_range.start, event.time_range.end) for event in kernels or found
    )
    total, until = 0.0, float("-inf")
    for start, end in ranges:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6

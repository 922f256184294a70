"""Which rank the others wait for.

The times of backward and of the optimizer are alike on all ranks, however slow one is:
each of them waits for the slowest in the collectives. What a rank does before the first
collective of a step, waiting for data and the forward pass, is its own.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ten_dist.console import say
from ten_dist.engine.distributed import Ranks

_MARKED_RATIO = 1.5
_MARKED_SHARE_OF_STEP = 0.05


class Stragglers:
    """Compares the ranks' own times every so many steps; of one rank does nothing.

    Of a step's accumulated micro-batches the first is timed, as there may be a collective
    in its backward. At ZeRO stage 3 the forward pass gathers parameters, so that only
    the time of data tells the ranks apart. An `interval` of 0 steps compares none.
    """

    def __init__(self, ranks: Ranks, interval: int) -> None:
        self._ranks = ranks
        self._interval = interval if ranks.world_size > 1 else 0
        self._on_gpu = ranks.device.type == "cuda"
        self._entered: dict[str, float] = {}
        self._events: dict[str, torch.cuda.Event] = {}
        self._window: list[tuple[float, Any, float]] = []
        """Of each step the seconds of data, forward, on GPUs as two events, and all."""

    def enter(self, phase: str) -> None:
        """Say that a step enters `phase`: data, forward, backward or optimizer."""
        if not self._interval or phase in self._entered:
            return
        self._entered[phase] = time.perf_counter()
        if self._on_gpu:
            # A GPU works behind Python's back; its own clock is read at a comparison.
            self._events[phase] = torch.cuda.Event(enable_timing=True)
            self._events[phase].record()

    def end_step(self, step: int, seconds: float) -> dict[str, Any]:
        """Say that a step is done; every rank must call this.

        Args:
            step: its number, from 1.
            seconds: that it took.

        Returns:
            Metrics of a step that ends a window, else nothing: `slowest_rank`,
            `slowest_rank_seconds` of data and forward a step on it, and
            `median_rank_seconds`, of two ranks those of the faster.
        """
        if not self._interval:
            return {}
        entered, events = self._entered, self._events
        self._entered, self._events = {}, {}
        forward: Any = entered["backward"] - entered["forward"]
        if self._on_gpu:
            forward = events["forward"], events["backward"]
        self._window.append((entered["forward"] - entered["data"], forward, seconds))
        return {} if step % self._interval else self._compare(step)

    def _compare(self, step: int) -> dict[str, Any]:
        data, forward, whole = zip(*self._window)
        self._window = []
        if self._on_gpu:
            torch.cuda.synchronize()
            forward = tuple(a.elapsed_time(b) / 1000 for a, b in forward)
        mean = statistics.fmean
        times = self._ranks.gather((mean(data), mean(forward)))
        own = [data + forward for data, forward in times]
        median = statistics.median_low(own)
        slowest = own.index(max(own))
        behind = own[slowest] - median
        if own[
            slowest
        ] > _MARKED_RATIO * median and behind > _MARKED_SHARE_OF_STEP * mean(whole):
            data_seconds, forward_seconds = times[slowest]
            say(
                f"step {step:,}: rank {slowest} is slow: {data_seconds:.3f} s of data and "
                f"{forward_seconds:.3f} s of forward a step over the last {len(whole):,} "
                f"steps, the median rank {median:.3f} s in all"
            )
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": own[slowest],
            "median_rank_seconds": median,
        }

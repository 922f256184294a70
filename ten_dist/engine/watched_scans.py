"""Watching the scans of a model in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import deepspeed

from ten_dist.engine.evaluating import evaluating
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.recurrence.observer import ScanObserver, observed

Observer = TypeVar("Observer", bound=ScanObserver)


@contextlib.contextmanager
def watched(
    engine: deepspeed.DeepSpeedEngine, run: ResolvedRun, observer: Observer
) -> Iterator[Observer]:
    """In a block, the engine evaluates and shows its scans to an observer."""
    with evaluating(engine, run), observed(observer):
        yield observer

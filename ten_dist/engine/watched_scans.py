"""Watching the scans of a model in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import deepspeed
import torch

from ten_dist.engine.resolution import ResolvedRun
from ten_dist.recurrence.observer import ScanObserver, observed

Observer = TypeVar("Observer", bound=ScanObserver)


@contextlib.contextmanager
def watched(
    engine: deepspeed.DeepSpeedEngine, run: ResolvedRun, observer: Observer
) -> Iterator[Observer]:
    """In a block, the engine evaluates and shows its scans to an observer."""
    engine.eval()
    try:
        with contextlib.ExitStack() as stack:
            if run.training.compile:
                # A graph has no place from where its scans could be watched.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield stack.enter_context(observed(observer))
    finally:
        engine.train()

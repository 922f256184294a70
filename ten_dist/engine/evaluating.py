"""A model in training that evaluates for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed
import torch

from ten_dist.engine.resolution import ResolvedRun


@contextlib.contextmanager
def evaluating(engine: deepspeed.DeepSpeedEngine, run: ResolvedRun) -> Iterator[None]:
    """In a block, the engine evaluates, and nothing new is compiled.

    Each length of a piece and each number of rows would be; and in a graph there is no place
    from where scans could be watched.
    """
    engine.eval()
    try:
        with contextlib.ExitStack() as stack:
            if run.training.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        engine.train()

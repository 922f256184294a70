"""What lay in the memory of a GPU when it ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ten_dist.console import warn
from ten_dist.files import replaced

_ENTRIES = 100_000
"""Allocations that are remembered with their stacks; torch's own default has no limit."""


@contextlib.contextmanager
def snapshot_when_memory_runs_out(
    folder: Path, rank: int, *, history: bool
) -> Iterator[None]:
    """Leave `rankNNNN_memory.pickle` in a folder where the memory of the GPU runs out.

    https://pytorch.org/memory_viz shows it. The error goes on.

    Args:
        folder: `profile/` of the run; made when there is something to write.
        rank: of this process.
        history: also remember where each block was allocated, from now on. That takes time
            at every allocation.
    """
    recording = history and torch.cuda.is_available()
    if recording:
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
    try:
        yield
    except torch.OutOfMemoryError:
        _leave(folder / f"rank{rank:04d}_memory.pickle")
        raise
    finally:
        if recording:
            torch.cuda.memory._record_memory_history(enabled=None)


def _leave(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        warn(f"memory ran out, and no snapshot of it could be written: {reason}")
    else:
        warn(f"memory ran out: what lay in it is in {path}")

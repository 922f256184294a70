"""Lines for the person at the terminal."""

from __future__ import annotations

import contextlib
import sys

from tqdm import tqdm

from ten_dist.own_rank import own_rank


def say(message: str) -> None:
    """Print a line, above a progress bar if there is one; rank 0 only."""
    if own_rank().rank == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print a line to the error output, from any rank and from its data workers.

    Nothing is locked: a worker that is killed in here must not leave the others waiting.
    """
    own = own_rank()
    origin = "ten-dist" if own.world_size == 1 else f"ten-dist, rank {own.rank}"
    # Nobody may be listening any more.
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{origin}: {message}\n")
        sys.stderr.flush()


def complain(message: str) -> None:
    """Print a line to the error output; the first rank of each machine only.

    Ranks fail alike, and one line a machine is enough to find it.
    """
    if own_rank().local_rank == 0:
        tqdm.write(f"ten-dist: {message}", file=sys.stderr)
        sys.stderr.flush()

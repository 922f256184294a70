"""Lines for the person at the terminal."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def say(message: str) -> None:
    """Print a line, above a progress bar if there is one; rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print a line to the error output, from any rank and from its data workers.

    Nothing is locked: a worker that is killed in here must not leave the others waiting.
    """
    rank = os.environ.get("RANK", "0")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    origin = "ten-dist" if alone else f"ten-dist, rank {rank}"
    sys.stderr.write(f"{origin}: {message}\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """Print a line to the error output; the first rank of each machine only.

    Ranks fail alike, and one line a machine is enough to find it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"ten-dist: {message}", file=sys.stderr)
        sys.stderr.flush()

"""The progress bar over the work of all ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from data_prep.ranks import Ranks, Tick

T = TypeVar("T")


def work_with_bar(
    ranks: Ranks, job: Callable[[Tick], T], title: str, total: int, there: int
) -> list[T] | None:
    """:meth:`Ranks.work` with a bar on rank 0: bytes, MB/s and, if any, tokens/s.

    The bar starts at ``there`` of ``total`` bytes; the rates are those of this start.
    """
    with tqdm(
        total=total,
        initial=there,
        desc=title,
        unit="B",
        unit_scale=True,
        # In a log file each update is a line of its own.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=ranks.rank != 0,
    ) as bar:
        started = time.monotonic()
        tokens = 0

        def show(count: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            if tokens:
                rate = tokens / max(time.monotonic() - started, 1e-3)
                text = f"{tqdm.format_sizeof(rate)} tokens/s"
                bar.set_postfix_str(text, refresh=False)
            bar.update(count)

        return ranks.work(job, show)

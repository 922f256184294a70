"""How the C library manages the memory of a process, for the work that it does.

A C library without these settings is left as it is.
"""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, see malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for those of the next step.

    By default a large block is mapped when it is allocated and given back when it is
    freed: a training step then waits for the system to clear, page by page, the same
    gigabytes again, which took a tenth of its time. The process stays as large as its
    largest step.
    """
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, -1)


def share_arenas(most: int) -> None:
    """Let all threads of a process allocate from a few heaps.

    By default there are eight for each processor core. What one thread allocates and
    another frees stays in the heap of the first, and each grows to the most that its
    threads ever had at one time.
    """
    _set(_M_ARENA_MAX, most)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)

"""Memory of a process that trains on the CPU."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, see malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for those of the next step.

    By default a large block is mapped when it is allocated and given back when it is
    freed: a training step then waits for the system to clear, page by page, the same
    gigabytes again, which took a tenth of its time. The process stays as large as its
    largest step. A C library without these settings is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)

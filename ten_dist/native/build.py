"""The C++ operators of this folder: compiled for this very processor when one of them is
first needed, and loaded. They are then in `torch.ops.ten_dist_cpu`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ten_dist.native.library import Extension

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
# No -ffast-math: the sources round by exact sums.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


@functools.cache
def unavailable() -> str | None:
    """Why there are no C++ operators here, or None once they are loaded.

    The first call compiles them where that has not been done before.
    """
    try:
        Extension(
            "operators for this processor",
            "ten_dist_cpu",
            [str(source) for source in _SOURCES],
            extra_cflags=list(_FLAGS),
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        ).load()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None

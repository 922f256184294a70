"""Compiling the C++ operators of this folder, and loading them.

It happens when one of them is first needed, for this very processor, and the result is
kept where torch keeps the extensions that it builds (TORCH_EXTENSIONS_DIR). The operators
are then in `torch.ops.ten_dist_cpu`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ten_dist.own_rank import own_rank

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# No -ffast-math: the sources round by exact sums.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


@functools.cache
def unavailable() -> str | None:
    """Why there are no C++ operators here, or None once they are loaded.

    The first call compiles them where that has not been done before.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on PATH"
    if shutil.which("ninja") is None and not _beside_python("ninja"):
        return "ninja is not installed"
    # Imported here: it takes a second, and inspects the machine.
    from torch.utils import cpp_extension

    name = f"ten_dist_cpu_{_build_identity(compiler)}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    if not (folder / f"{name}.so").is_file() and own_rank().local_rank == 0:
        # Not to the standard output, which belongs to the program.
        notice = f"ten-dist: compiling operators for this processor in {folder}, once"
        print(notice, file=sys.stderr, flush=True)
    try:
        with _only_builder(folder):
            cpp_extension.load(
                name=name,
                sources=[str(source) for source in _SOURCES],
                extra_cflags=list(_FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"the operators could not be compiled: {str(error).splitlines()[0]}"
    return None


def _beside_python(program: str) -> bool:
    """Make a program of this Python's environment found, where it is not activated."""
    folder = Path(sys.executable).parent
    if not (folder / program).is_file():
        return False
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return True


def _build_identity(compiler: str) -> str:
    """What makes one build differ from another; nodes may share a file system."""
    try:
        target = subprocess.run(
            [compiler, "-march=native", "-Q", "--help=target"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        target = ""
    parts = (
        *(path.read_text() for path in _SOURCES + _HEADERS),
        " ".join(_FLAGS),
        torch.__version__,
        platform.machine(),
        target,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a build, with a lock that ends with its process.

    torch's own lock is a file that stays where a build was killed, and that every later
    one waits for, for ever: whoever is alone here may remove it.
    """
    with open(folder / "builder", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield

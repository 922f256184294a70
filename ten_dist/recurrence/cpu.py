"""The eigenstate scan as a C++ operator for CPUs.

It is compiled for this processor when it is first needed and cached where torch keeps
the extensions that it builds (TORCH_EXTENSIONS_DIR). As a registered operator with a
fake implementation it does not break a graph under `torch.compile`.

Memory for backward: the arguments and the returned states, which the caller holds
anyway. Eigenvalues are computed again from the modulation.
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
from torch import Tensor

from ten_dist.recurrence.operator import register_tracing, unit_stride

_SOURCE = Path(__file__).with_name("cpu_scan.cpp")
# No -ffast-math: the source rounds by exact sums.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def cpu_scan(
    beta: Tensor,
    alpha: Tensor,
    omega: Tensor,
    modulation: Tensor | None,
    ranges: Tensor,
    input_norm: str,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigenstate_scan` for float32, bfloat16 and float16 on the CPU, with the energy.

    The operator is the one that :func:`unavailable` has loaded. It has no float16, which
    trains on GPUs: such inputs are converted to float32, in memory of their own, and the
    states back. They are then rounded once, and backward works with those from before.
    """
    if beta.dtype == torch.float16:
        states, final_state, energy = cpu_scan(
            beta.float(),
            alpha,
            omega,
            modulation,
            ranges,
            input_norm,
            initial_state,
            resets,
        )
        return states.to(beta.dtype), final_state, energy
    return torch.ops.ten_dist_cpu.scan_forward(
        unit_stride(beta),
        alpha.float().contiguous(),
        omega.float().contiguous(),
        ranges.float().contiguous(),
        None if modulation is None else unit_stride(modulation.to(beta.dtype)),
        None if initial_state is None else initial_state.float().contiguous(),
        None if resets is None else resets.contiguous(),
        input_norm,
    )


@functools.cache
def unavailable() -> str | None:
    """Why there is no C++ operator here, or None once it is loaded.

    The first call compiles it where that has not been done before.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on PATH"
    if shutil.which("ninja") is None and not _beside_python("ninja"):
        return "ninja is not installed"
    # Imported here: it takes a second, and inspects the machine.
    from torch.utils import cpp_extension

    name = f"ten_dist_cpu_scan_{_build_identity(compiler)}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    if (
        not (folder / f"{name}.so").is_file()
        and os.environ.get("LOCAL_RANK", "0") == "0"
    ):
        # Not to the standard output, which belongs to the program.
        notice = f"ten-dist: compiling the scan for this processor in {folder}, once"
        print(notice, file=sys.stderr, flush=True)
    try:
        with _only_builder(folder):
            cpp_extension.load(
                name=name,
                sources=[str(_SOURCE)],
                extra_cflags=list(_FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"the scan could not be compiled: {str(error).splitlines()[0]}"
    register_tracing("ten_dist_cpu")
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
        _SOURCE.read_text(),
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

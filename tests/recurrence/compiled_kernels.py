"""Compile the scan's Triton kernels for a GPU that need not be there.

    python -m tests.recurrence.compiled_kernels

Prints, as JSON, the registers, stack bytes and local bytes a thread of each kernel takes
on a Hopper GPU, by the assembler that comes with Triton. Stack or local memory would mean
that registers spill.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ten_dist.recurrence import (
    triton_backward,
    triton_chunks,
    triton_forward,
    triton_scan,
)

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SEQUENCES = {"beta", "modulation", "states", "gradient", "grad_beta", "grad_modulation"}
SIZES = {"steps", "chunk", "chunks", "group"}


def signature(kernel, constants, dtype):
    """Types of a kernel's arguments: sequences in `dtype`, sizes and strides, floats."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in SEQUENCES:
            types[name] = f"*{dtype}"
        elif name in SIZES or name.endswith(("_step", "_batch")):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types


def resource_use(kernel, constants, dtype="fp32"):
    """Registers, stack and local bytes of one compiled kernel."""
    source = ASTSource(
        kernel, signature=signature(kernel, constants, dtype), constexprs=constants
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    names = ("registers", "stack_bytes", "local_bytes")
    return dict(zip(names, map(int, found.groups())))


def main():
    """Compile what a training step launches, in both dtypes, and rarer variants."""
    options = {"WIDTH": 240, "BLOCK": triton_scan.BLOCK}
    forward = options | {"UNROLL": triton_scan.UNROLL}
    backward = options | {"UNROLL": triton_scan.UNROLL_BACKWARD}
    report = {}
    for dtype, modulated, gain, more in (
        ("bf16", True, 0, False),
        ("fp32", True, 2, True),
        ("bf16", False, 1, True),
    ):
        variant = {"MODULATED": modulated, "GAIN": gain}
        entering = {"HAS_ENTERING": True}
        energy = {"ENERGY": not more}
        for kernel, constants in (
            (triton_forward.reduce_forward, forward | variant),
            (triton_forward.scan_forward, forward | variant | entering),
            (
                triton_backward.reduce_backward,
                backward | energy | {"MODULATED": modulated},
            ),
            (
                triton_backward.scan_backward,
                backward | variant | entering | energy | {"HAS_INITIAL": more},
            ),
        ):
            name = f"{kernel.__name__} {dtype} {modulated=} {gain=} {more=}"
            report[name] = resource_use(kernel, constants, dtype)
    for reverse in (False, True):
        direction = forward | {"REVERSED": reverse}
        report[f"carry {reverse=}"] = resource_use(
            triton_chunks.carry, direction | {"HAS_ENTERING": reverse}
        )
        report[f"compose {reverse=}"] = resource_use(triton_chunks.compose, direction)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

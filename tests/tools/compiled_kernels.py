"""Compile what the Triton scan launches, for a Hopper GPU that need not be there.

    python -m tests.tools.compiled_kernels

A stand-in for Triton's driver says that there is such a GPU, and launching is left out;
all else is what happens on one, from the arguments of the scan to machine code. Prints as
JSON, for each kernel that is launched, the registers, stack bytes and local bytes that a
thread takes, by the assembler that comes with Triton, and the variants that other sizes
compile besides. Stack or local memory would mean that registers spill.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ten_dist.recurrence import ScanInputs, eigenstate_scan_with_energy, triton_scan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTH = 40


class HopperDriver:
    """What the compiler asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_instead_of_launching():
    """From here on launches compile alone; returns the list that they are added to."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(HopperDriver())
    JITFunction.run = compile_only
    triton_scan.unavailable = lambda device_type: None
    return compiled


def launch(beta, modulated, input_norm, initial, with_energy, resets=False):
    """Forward and backward of a scan of `beta`; the values are left undefined."""
    batch, steps = beta.shape[:2]
    beta = beta.requires_grad_()
    inputs = ScanInputs(
        beta,
        alpha=torch.zeros(WIDTH),
        omega=torch.zeros(WIDTH),
        ranges=torch.full((2, WIDTH), 0.1),
        modulation=torch.empty_like(beta).requires_grad_() if modulated else None,
        initial_state=torch.zeros(batch, 2 * WIDTH) if initial else None,
        resets=torch.zeros(batch, steps, dtype=torch.bool) if resets else None,
        input_norm=input_norm,
    )
    states, final, energy = eigenstate_scan_with_energy(inputs, "triton")
    loss = states.sum() + final.sum()
    (loss + energy.sum() if with_energy else loss).backward()


def sliced(batch, steps, dtype):
    """Columns of a wider tensor, as a mixer passes them."""
    return torch.zeros(batch, steps, 5 * WIDTH, dtype=dtype)[..., : 2 * WIDTH].detach()


def resource_use(kernel):
    """Registers, stack and local bytes of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
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
    """What training launches in all dtypes, rarer variants, then other sizes."""
    compiled = compile_instead_of_launching()
    kernels = {}
    for variant in (
        (torch.bfloat16, True, "none", False, True),
        (torch.float16, True, "none", False, True),
        (torch.float32, True, "dynamic", True, True),
        (torch.bfloat16, False, "static", True, False),
        (torch.bfloat16, True, "dynamic", False, True, True),
    ):
        dtype, *options = variant
        launch(sliced(2, 200, dtype), *options)
        # A carry in groups, both ways.
        triton_scan.CARRY_LIMIT = 1
        launch(sliced(2, 200, dtype), *options)
        triton_scan.CARRY_LIMIT = 512
        for kernel in compiled:
            kernels[kernel.hash] = (f"{kernel.metadata.name} {variant}", kernel)
        compiled.clear()
    report = [
        {"name": name} | resource_use(kernel) for name, kernel in kernels.values()
    ]

    for batch, steps in ((1, 65), (3, 333), (16, 2048), (2, 6000)):
        launch(
            sliced(batch, steps, torch.bfloat16), True, "none", False, with_energy=True
        )
    again = {kernel.hash for kernel in compiled} - set(kernels)
    compiled.clear()
    # Rows 2^31 elements apart; memory that is not touched is not taken.
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = far.as_strided((2, 200, 2 * WIDTH), (2**31, 2 * WIDTH, 1))
    launch(far, False, "none", False, with_energy=False)
    wide = [k.src.signature.get("beta_batch") for k in compiled if "forward" in k.name]
    json.dump(
        {"kernels": report, "more_for_other_sizes": len(again), "far_rows": wide},
        sys.stdout,
        indent=1,
    )


if __name__ == "__main__":
    main()

"""Memory that a training step frees is there for the next."""

import subprocess
import sys

import pytest

# Tensors of 40 MB: glibc maps whatever exceeds 32 MiB anew at each allocation.
PROGRAM = """
import resource, sys, torch
from ten_dist.engine.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
inputs = torch.randn(10_000_000, requires_grad=True)

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    inputs.sigmoid().tanh().mean().backward()
    inputs.grad = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The heap may still grow in some of the steps, as its free pieces happen to lie.
print(min(faults_of_a_step() for _ in range(12)))
"""


def page_faults(mode):
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(output)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_of_a_step_is_not_cleared_again_for_the_next():
    assert page_faults("kept") < page_faults("given back") / 10

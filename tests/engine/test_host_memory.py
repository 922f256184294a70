"""Memory that a training step frees is there for the next."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from ten_dist.engine.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
inputs = torch.randn(2048, 1024)

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        layers(inputs).square().mean().backward()
        layers.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(4)
print(faults(4))
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

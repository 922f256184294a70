"""What the C library does with memory that is freed."""

import subprocess
import sys

import pytest

# Tensors of 40 MB: glibc maps whatever exceeds 32 MiB anew at each allocation.
PROGRAM = """
import resource, sys, torch
from ten_dist.host_memory import keep_freed_memory

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


THREADS = """
import sys, threading
from ten_dist.host_memory import share_arenas

if sys.argv[1] == "shared":
    share_arenas(1)

def work():
    # Of a kilobyte each, as a tokenizer's are: Python's own allocator does not take them.
    blocks = [bytes(1000) for _ in range(20_000)]
    there.wait()

def heaps():
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file]
    # Arenas of threads begin at multiples of 64 MiB.
    starts = [int(words[0].split("-")[0], 16) for words in lines if len(words) == 5]
    return sum(start % 2**26 == 0 for start in starts)

there = threading.Barrier(5)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
there.wait()
print(heaps())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_share_a_heap():
    def count(mode):
        command = [sys.executable, "-c", THREADS, mode]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(output.stdout)

    assert count("shared") < count("own")

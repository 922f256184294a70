"""Compiling the C++ operators."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ten_dist import native


def test_without_a_compiler_the_reason_is_given(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = native.unavailable.__wrapped__()
    assert reason == "no C++ compiler: no-such-compiler is not on PATH"


@pytest.mark.skipif(native.unavailable() is not None, reason="there is no C++ compiler")
def test_a_build_that_was_killed_blocks_nobody():
    (library,) = (p for p in torch.ops.loaded_libraries if "ten_dist_cpu_" in p)
    lock = Path(library).with_name("lock")
    lock.touch()
    code = "from ten_dist.recurrence import available_backends as b; print(*b())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert output.split()[0] == "cpu"
    assert not lock.exists()

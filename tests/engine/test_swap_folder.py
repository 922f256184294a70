"""The folders that ranks swap to: whose they are, and that a full disk is said."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from ten_dist.engine.swap_folder import _abandoned, _locked_folder, _reserving
from ten_dist.errors import TrainingError

LOOK = """
import sys, time
from pathlib import Path
from ten_dist.engine.swap_folder import _abandoned

until = time.monotonic() + 3
while time.monotonic() < until:
    if len(_abandoned(Path(sys.argv[1]))) != 1:
        sys.exit("it was taken for one that is in use")
"""


def test_those_who_look_at_one_time_see_the_same(tmp_path):
    with _locked_folder(tmp_path) as own:
        (tmp_path / "ten_dist_swap_dead").mkdir()
        (tmp_path / "ten_dist_swap_dead" / "lock").touch()
        commands = [[sys.executable, "-c", LOOK, tmp_path]] * 2
        looking = [subprocess.Popen(command) for command in commands]
        assert [process.wait(60) for process in looking] == [0, 0]
        assert own.is_dir()
    assert not own.exists()
    assert [path.name for path in _abandoned(tmp_path)] == ["ten_dist_swap_dead"]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    """DeepSpeed does not look at the results of its writes."""

    class Plain:
        def async_pwrite(self, buffer, file, offset):
            written.append(file)
            return 0

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = []
    handle = _reserving(Plain, tmp_path)()
    file = str(tmp_path / "1.tensor.swp")
    for _ in range(2):
        handle.async_pwrite(torch.zeros(4096), file, 0)
    assert written == [file, file]
    assert os.stat(file).st_blocks * 512 >= 4 * 4096
    monkeypatch.setattr(os, "posix_fallocate", fail)
    # Its blocks are there already.
    handle.async_pwrite(torch.zeros(4096), file, 0)
    with pytest.raises(TrainingError, match=f"--nvme_path {tmp_path} is full"):
        handle.async_pwrite(torch.zeros(4096), str(tmp_path / "2.tensor.swp"), 0)
    assert len(written) == 3

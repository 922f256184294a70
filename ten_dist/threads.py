"""How many threads compute, and how they wait for each other.

Threads of OpenMP that wait spin by default, and beside other work they then hold up the
very threads that they wait for: what takes 10 seconds alone takes minutes. How they wait
has to be in the environment before torch is imported. What a user has set there holds.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from ten_dist.own_rank import OwnRank

_CGROUP = Path("/sys/fs/cgroup")

_chosen_here = False


def settle_threads(own: OwnRank) -> None:
    """Put into the environment what OpenMP reads when torch is imported.

    Threads sleep while they wait. There are as many as cores that this process may use,
    shared among the ranks of the machine: not fewer beside other work, where as many
    threads that sleep are the fastest, too, and a number that does not change from one
    start of a run to the next, as the last bit of a sum may.
    """
    global _chosen_here
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if os.environ.get("OMP_NUM_THREADS"):
        return
    share = max(1, usable_cores() // max(1, own.local_world_size))
    os.environ["OMP_NUM_THREADS"] = str(share)
    _chosen_here = True
    cores = len(os.sched_getaffinity(0))
    if usable_cores() < cores and own.local_rank == 0:
        print(
            f"ten-dist: computing in {share} threads of {cores} cores, by the limit of "
            "this container (OMP_NUM_THREADS says otherwise)",
            file=sys.stderr,
        )


def compute_in_one_thread() -> None:
    """From now on, unless the user has said how many threads there are."""
    import torch

    if _chosen_here:
        torch.set_num_threads(1)


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: by its affinity and the limit of its container."""
    cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cores, _cgroup_limit(cgroup))))


def _cgroup_limit(cgroup: Path) -> float:
    """Cores that the control group may keep busy; infinity without a limit."""
    # Version 2 has both numbers in one file, version 1 in two.
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = [
                word for file in files for word in (cgroup / file).read_text().split()
            ]
            quota, period = map(int, words)
            # No limit is -1 in version 1, and "max", which is no number, in version 2.
            return quota / period if quota > 0 else math.inf
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf

"""What DeepSpeed and torch do not promise, and the engine relies on all the same.

Every private name of theirs that the engine touches is in this file, or in
`checkpointing/held_state.py` where it is of ZeRO's state, checked against DeepSpeed 0.19.8
and torch 2.13.0; `tests/engine/test_deepspeed_internals.py` fails where a release has lost
one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
from typing import Any

from deepspeed.runtime import compiler
from torch.distributed import distributed_c10d


def set_timeout_of_groups(timeout: datetime.timedelta) -> None:
    """Give every process group that there is a timeout.

    Those that DeepSpeed makes have torch's own, 10 minutes with NCCL: shorter than a slow
    start takes, and an end without a report.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def leave_out_shared_memory_operator() -> None:
    """Have DeepSpeed neither compile nor use its operator for inference on CPUs.

    No training calls it. It costs half a minute of compilation, behind a lock for which
    everybody waits for ever once a build was killed, and in the memory that processes
    share 64 MiB a rank, which nobody frees.
    """
    # Imported by its name: `deepspeed.comm.torch` as an attribute is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def import_muon() -> None:
    """Import DeepSpeed's Muon without having its functions compiled.

    DeepSpeed does it at every start to see that an optimizer is not Muon, and the
    decorators of its functions load torch's compiler: more than a second of each rank.
    """
    compile_decorator = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        # DeepSpeed goes on without it, too.
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_decorator

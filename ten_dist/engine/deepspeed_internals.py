"""What DeepSpeed and torch do not promise, and the engine relies on all the same.

Every private name of theirs that the engine touches is in this file, checked against
DeepSpeed 0.19.8 and torch 2.13.0; `tests/engine/test_deepspeed_internals.py` fails where a
release has lost one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime import compiler
from torch import Tensor
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


# Stages 1 and 2: `zero` is DeepSpeed's optimizer, parameters are those of the module.


def flat_partitions(zero: Any) -> list[Tensor]:
    """The float32 range of each group's flat vector that this rank holds."""
    # The first is ZeRO's, the second that of its optimizer for bfloat16 parameters.
    groups = getattr(zero, "single_partition_of_fp32_groups", None)
    return groups or zero.fp32_groups_flat_partition


def range_of_fragment(parameter: Any) -> tuple[int, int] | None:
    """Elements [start, stop) of a parameter in this rank's partition, if there are any."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # What DeepSpeed calls low precision (lp) are the parameters of the module.
    address = mapping.lp_fragment_address
    return address.start, address.start + address.numel


def place_of_fragment(parameter: Any) -> tuple[int, int]:
    """Group of a parameter, and where its elements begin in this rank's partition."""
    mapping = parameter._hp_mapping
    return mapping.param_group_index, mapping.hp_fragment_address.start


# Stage 3.


def flat_shards(zero: Any) -> list[Tensor]:
    """The float32 shards of the parameters of each group, in one flat vector."""
    return zero.fp32_partitioned_groups_flat


def range_of_shard(parameter: Any) -> tuple[int, int]:
    """Elements [start, stop) of a parameter that this rank holds."""
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    start = rank * parameter.partition_numel()
    return start, min(start + parameter.partition_numel(), parameter.ds_numel)


def place_of_shard(zero: Any, parameter: Any) -> tuple[int, int]:
    """Group of a parameter, and where its shard begins in the group's vector."""
    return zero.grad_position[zero.get_param_id(parameter)][:2]


def swaps_optimizer(zero: Any) -> bool:
    """Whether the optimizer's state is on NVMe."""
    return zero.swap_optimizer


@contextlib.contextmanager
def swapped_in(zero: Any, group: int, changed: bool) -> Iterator[None]:
    """Have a group's state in memory, and write it back if it is `changed` there."""
    swapped = zero._swappable_optimizer_subgroup(group)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if swapped and changed:
            zero._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            zero._release_swap_buffers(group)


def take_up_shards(zero: Any, group: int) -> None:
    """Have the model compute with a group's float32 shards, in its precision."""
    zero._reassign_or_swap_out_partitioned_parameters(group)


def free_whole_parameters(zero: Any) -> None:
    """Free the values of small parameters, which are kept whole between steps."""
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)


def gather_whole_parameters(zero: Any) -> None:
    """Gather small parameters, which are kept whole between steps."""
    zero.checkpoint_event_epilogue()

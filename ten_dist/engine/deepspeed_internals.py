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

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import Tensor, nn
from torch.distributed import distributed_c10d


def set_timeout_of_groups(timeout: datetime.timedelta) -> None:
    """Have every process group that there is wait for so long."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def leave_out_shared_memory_operator() -> None:
    """Have DeepSpeed neither compile nor use its operator for inference on CPUs.

    No training calls it. It costs half a minute of compilation, behind a lock for which
    everybody waits for ever once a build was killed, and in the memory that processes
    share 64 MiB a rank, which nobody frees.
    """
    # Imported by its name: `deepspeed.comm.torch` as an attribute is torch itself.
    backend = importlib.import_module("deepspeed.comm.torch")
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


def end_step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drop the gradients of a step at stage 0, as DeepSpeed does it at the others."""
    engine.zero_grad()
    engine.micro_steps += 1


def override_loss_scale(engine: deepspeed.DeepSpeedEngine, scale: float) -> None:
    """Have ZeRO scale the loss, and look at the norm, clip and update without the scale."""
    engine.optimizer.override_loss_scale(scale)


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of a parameter or buffer, of which stage 3 may hold a part only."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def partitioned_groups(zero: Any) -> list[Tensor]:
    """Stages 1 and 2: of each group, this rank's range of its flat float32 weights."""
    # The first is ZeRO's, the second that of its optimizer for bfloat16 parameters.
    groups = getattr(zero, "single_partition_of_fp32_groups", None)
    return groups or zero.fp32_groups_flat_partition


def range_in_parameter(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Stages 1 and 2: elements [start, stop) of a parameter that this rank holds, or None."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # What DeepSpeed calls low precision are the parameters of the module.
    address = mapping.lp_fragment_address
    return address.start, address.start + address.numel


def range_in_group(parameter: nn.Parameter) -> tuple[int, int, int]:
    """Stages 1 and 2: the group of what this rank holds, where in it, and how much."""
    mapping = parameter._hp_mapping
    address = mapping.hp_fragment_address
    return mapping.param_group_index, address.start, address.numel


def sharded_groups(zero: Any) -> list[Tensor]:
    """Stage 3: of each sub-group, this rank's flat float32 weights."""
    return zero.fp32_partitioned_groups_flat


def shard_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Stage 3: elements [start, stop) of a parameter that this rank holds; may be none."""
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    start = rank * parameter.partition_numel()
    return start, min(start + parameter.partition_numel(), parameter.ds_numel)


def shard_place(zero: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Stage 3: the sub-group of a parameter, and where it begins in the flat weights."""
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    return group, offset


def shard_values(parameter: nn.Parameter) -> Tensor:
    """Stage 3: what the model computes with, in its precision, flat, perhaps padded."""
    return parameter.ds_tensor.data


def partition_persistent(zero: Any) -> None:
    """Stage 3: let go of the old values of small parameters, kept whole between steps."""
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)


def gather_persistent(zero: Any) -> None:
    """Stage 3: bring small parameters, kept whole between steps, up to date."""
    zero.checkpoint_event_epilogue()


def swaps_state(zero: Any) -> bool:
    """Stage 3: whether weights and moments lie on NVMe."""
    return zero.swap_optimizer


@contextlib.contextmanager
def subgroup_in_memory(zero: Any, group: int, *, changed: bool) -> Iterator[None]:
    """Have a sub-group that is swapped in memory, and write it back if it is changed."""
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


def refresh_computed_weights(zero: Any, group: int) -> None:
    """Stage 3: have the model compute with the float32 weights of a swapped sub-group."""
    zero._reassign_or_swap_out_partitioned_parameters(group)

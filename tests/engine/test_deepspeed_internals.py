"""The private names of DeepSpeed and torch that the engine relies on are still there."""

import importlib
import importlib.resources
import inspect

import pytest

STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2"
STAGE_3 = "deepspeed.runtime.zero.stage3"
PARAMETERS = "deepspeed.runtime.zero.partition_parameters"
NAMES = {
    ("torch.distributed.distributed_c10d", "_world"),
    ("torch.distributed.distributed_c10d", "_set_pg_timeout"),
    ("deepspeed.comm.torch", "build_shm_op"),
    ("deepspeed.runtime.compiler", "compile"),
    ("deepspeed.runtime.zero.muon.original_muon", "compiler.compile"),
    ("deepspeed.runtime.engine", "self.micro_steps"),
    (STAGE_1_AND_2, "def override_loss_scale"),
    (STAGE_3, "def override_loss_scale"),
    (STAGE_1_AND_2, "self.single_partition_of_fp32_groups"),
    ("deepspeed.runtime.bf16_optimizer", "self.fp32_groups_flat_partition"),
    ("deepspeed.runtime.base_optimizer", "_hp_mapping"),
    ("deepspeed.utils.tensor_fragment", "lp_fragment_address"),
    ("deepspeed.utils.tensor_fragment", "hp_fragment_address"),
    ("deepspeed.utils.tensor_fragment", "param_group_index"),
    (PARAMETERS, "ds_shape"),
    (PARAMETERS, "ds_numel"),
    (PARAMETERS, "ds_tensor"),
    (PARAMETERS, "ds_process_group"),
    (PARAMETERS, "def partition_numel"),
    (STAGE_3, "self.fp32_partitioned_groups_flat"),
    (STAGE_3, "self.grad_position"),
    (STAGE_3, "def get_param_id"),
    (STAGE_3, "self.persistent_parameters"),
    (STAGE_3, "def checkpoint_event_epilogue"),
    (STAGE_3, "self.swap_optimizer"),
    (STAGE_3, "def _swappable_optimizer_subgroup"),
    (STAGE_3, "def _optimizer_states_and_gradient_swap_in"),
    (STAGE_3, "def _optimizer_states_and_gradient_swap_out"),
    (STAGE_3, "def _release_swap_buffers"),
    (STAGE_3, "def _reassign_or_swap_out_partitioned_parameters"),
}


@pytest.mark.parametrize(("module", "name"), sorted(NAMES))
def test_the_name_is_there(module, name):
    assert name in inspect.getsource(importlib.import_module(module))


def test_no_other_file_of_the_engine_touches_a_private_name_of_zero():
    from ten_dist import engine

    folder = importlib.resources.files(engine)
    private = ("._hp_mapping", ".ds_tensor", "grad_position", "fp32_partitioned")
    private += ("distributed_c10d", "build_shm_op", "swap_optimizer")
    for path in folder.rglob("*.py"):
        if path.name != "deepspeed_internals.py":
            text = path.read_text()
            assert not [name for name in private if name in text], path

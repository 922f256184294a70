"""ZeRO stage 3 with its state on NVMe trains, saves and continues as all others do."""

import json
import os

import pytest
from deepspeed.accelerator import get_accelerator

from ten_dist.deepspeed_config import SHIPPED_CONFIGS
from tests.tools.elastic_matrix import largest_difference
from tests.tools.launching import (
    from_step_four,
    step_metrics,
    train,
    train_in_turn,
    train_until_killed,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(),
        reason="libaio has no headers here (Debian: libaio-dev)",
    ),
]

STEPS = 12
# DeepSpeed swaps nothing smaller than 1 MiB: on two ranks a sub-group needs 2^18 weights of
# each.
OPTIONS = [
    *("--config", "pico", "--dim", 192, "--n_layers", 3, "--num_eigenstates", 96),
    *("--num_heads", 2, "--use_hten", "--hten_scales", "1,2", "--dropout", 0.1),
    *("--steps", STEPS, "--global_batch_size", 8, "--micro_batch_size", 2),
    *("--seq_len", 48, "--warmup_steps", 3, "--checkpoint_interval", 4),
    *("--precision", "fp32", "--num_workers", 0, "--data_verification", "size"),
    *("--optimizer", "adamw"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The shipped configuration with sub-groups so small that there are several."""
    content = json.loads((SHIPPED_CONFIGS / "nvme.json").read_text())
    content["zero_optimization"]["sub_group_size"] = 300_000
    # None stay whole, out of the way of what is swapped.
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    file = tmp_path_factory.mktemp("config") / "nvme.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def swapping(config, tmp_path):
    """Options of a training that swaps to a folder of the test."""
    (tmp_path / "swap").mkdir()
    return ["--deepspeed_config", config, "--nvme_path", tmp_path / "swap"]


PLAIN = ["--precision", "bf16_params", "--gradient_checkpointing", "block"]


@pytest.fixture(scope="module")
def whole_runs(token_data, tmp_path_factory):
    """Folders of whole runs without any offload, in float32 and with :data:`PLAIN`."""
    folder = tmp_path_factory.mktemp("nvme")
    stages = {"zero2": [], "zero3": PLAIN}
    train_in_turn(
        [*OPTIONS, "--data", token_data, *more]
        + ["--output_dir", folder / stage, "--deepspeed_config", stage]
        for stage, more in stages.items()
    )
    return [folder / stage for stage in stages]


@pytest.fixture(scope="module")
def reference(token_data, whole_runs):
    """Options of a whole run without any offload, and its folder."""
    return [*OPTIONS, "--data", token_data], whole_runs[0]


def swapped_files(folder):
    return {path.name for path in folder.rglob("*.tensor.swp")}


def test_killed_while_swapping_and_continued_without(reference, swapping, tmp_path):
    options, source = reference
    folder, swap = tmp_path / "run", tmp_path / "swap"
    options = [*options, "--output_dir", folder]
    train_until_killed([*options, *swapping], folder, 6)
    # Weights and both moments of several sub-groups were swapped.
    left = swapped_files(swap)
    for kind in ("exp_avg-", "exp_avg_sq-"):
        assert len([name for name in left if name.startswith(kind)]) > 1, left
    output = train([*options, "--deepspeed_config", "zero0"], ranks=0)
    assert "4 steps done" in output
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)


def test_continued_while_swapping_on_one_rank(reference, swapping, tmp_path):
    options, source = reference
    folder, swap = from_step_four(source, tmp_path / "run"), tmp_path / "swap"
    # What a killed run has left goes, what is another's stays.
    (swap / "ten_dist_swap_dead").mkdir()
    (swap / "ten_dist_swap_dead" / "1.tensor.swp").write_bytes(b"weights")
    (swap / "other.tensor.swp").write_bytes(b"another program's")
    options = [*options, "--output_dir", folder, *swapping]
    assert "4 steps done" in train(options, ranks=0)
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)
    assert os.listdir(swap) == ["other.tensor.swp"]


def test_bfloat16_parameters_with_recomputation(
    token_data, whole_runs, swapping, tmp_path
):
    """At the end there are float32 weights and moments as without offload."""
    plain, swapped = whole_runs[1], tmp_path / "swapped"
    options = [*OPTIONS, "--data", token_data, *PLAIN, "--output_dir", swapped]
    train([*options, *swapping])
    assert step_metrics(swapped) == pytest.approx(step_metrics(plain), rel=2e-3)
    name = "checkpoints/step_00000012"
    assert largest_difference(plain / name, swapped / name) < 2e-2
    assert not os.listdir(tmp_path / "swap")

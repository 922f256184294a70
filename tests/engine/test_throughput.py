"""What metrics say of speed."""

import json

import pytest

from ten_dist.cli import main
from tests.tools.launching import SMALL_MODEL, read_metrics, train_here


def test_utilization_is_of_the_operations_that_a_plan_counts(token_data, tmp_path):
    options = [*SMALL_MODEL, "--hten_scales", "1,2", "--seq_len", 32]
    data = ["--data", token_data, "--output_dir", tmp_path / "run", "--num_workers", 0]
    train_here([*options, *data, "--steps", 3, "--peak_tflops", 0.25])
    plan = [*options, "--vocab_size", 257, "--gpus_per_node", 1]
    plan += ["--json", tmp_path / "plan.json"]
    assert main(["plan", *map(str, plan)]) == 0
    operations = json.loads((tmp_path / "plan.json").read_text())["chosen"][
        "flops_per_token"
    ]
    steps = [m for m in read_metrics(tmp_path / "run") if "loss" in m]
    for metrics in steps:
        rate = metrics["tokens_per_second"]
        assert metrics["tokens_per_second_per_device"] == rate
        assert metrics["mfu"] == pytest.approx(rate * operations / 0.25e12)
        share = metrics["data_seconds"] / metrics["step_seconds"]
        assert metrics["data_share"] == pytest.approx(share)
    assert len(steps) == 3

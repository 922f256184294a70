"""Steps whose loss or gradient is wrong do not reach the weights."""

import json
import math

import pytest
import torch

from ten_dist.checkpoint import HealthState
from ten_dist.cli import main
from ten_dist.engine.health import Health
from tests.tools.faulty_train import train_with
from tests.tools.launching import (
    SMALL_MODEL,
    checkpoint_of,
    read_ledger,
    read_metrics,
    step_metrics,
    train,
)

STEPS = 10
OPTIONS = [
    *SMALL_MODEL,
    *("--steps", STEPS, "--global_batch_size", 8, "--seq_len", 32, "--seed", 3),
    *("--micro_batch_size", 2, "--precision", "fp32", "--num_workers", 0),
    *("--checkpoint_interval", 3, "--ledger", "--warmup_steps", 0),
]


def judge(health, loss, norm=1.0):
    """What a step of that loss and gradient norm is found to be, and its factor."""
    factor = health.factor(torch.tensor(loss))
    return health.judge(loss, norm), float(factor)


def test_spikes_are_those_far_above_the_last_steps():
    generator = torch.Generator().manual_seed(0)
    health = Health(6, HealthState())
    for noise in torch.randn(200, generator=generator).tolist():
        anomaly, factor = judge(health, 3 + 0.1 * noise, 1 + 0.1 * noise)
        assert anomaly is None and factor == 1
    anomaly, factor = judge(health, 3.5)
    assert anomaly is None and factor == 1
    anomaly, factor = judge(health, 4.5)
    assert anomaly.kind == "loss_spike" and math.isnan(factor)
    assert not anomaly.applied
    # A spike does not become part of what is usual, and neither does a drop alarm.
    assert judge(health, 4.5)[0].kind == "loss_spike"
    assert judge(health, 0.1)[0] is None
    anomaly, factor = judge(health, 3.0, 9.0)
    assert anomaly.kind == "gradient_spike" and anomaly.applied and factor == 1
    assert health.skipped_steps == 2


def test_gradient_norms_may_vary_by_factors():
    generator = torch.Generator().manual_seed(2)
    health = Health(6, HealthState())
    norms = (0.6 * torch.randn(1000, generator=generator)).exp().tolist()
    # Some lie more than 6 of their standard deviations above the mean.
    assert max(norms) > 6
    assert all(judge(health, 3.0, norm)[0] is None for norm in norms)
    assert judge(health, 3.0, 200.0)[0].kind == "gradient_spike"


def test_what_is_not_finite_is_found_from_the_first_step():
    health = Health(0, HealthState())
    for value in (math.nan, math.inf):
        anomaly, factor = judge(health, value)
        assert anomaly.kind == "not_finite" and math.isnan(factor)
    # The loss is finite, its gradient overflows.
    assert judge(health, 3.0, math.inf)[0].kind == "not_finite"
    assert (health.skipped_steps, health.consecutive) == (3, 3)
    assert judge(health, 3.0)[0] is None
    assert health.consecutive == 0


def test_a_restored_health_judges_the_same():
    generator = torch.Generator().manual_seed(1)
    values = (3 + torch.randn(150, generator=generator).exp()).tolist()
    whole, first = Health(3, HealthState()), Health(3, HealthState())
    for value in values[:70]:
        judge(whole, value, value)
        judge(first, value, value)
    second = Health(3, first.state())
    verdicts = [
        [judge(health, value, value) for value in values[70:]]
        for health in (whole, second)
    ]
    assert str(verdicts[0]) == str(verdicts[1])
    assert any(anomaly is not None for anomaly, _ in verdicts[0])
    assert whole.state() == second.state()


@pytest.fixture(scope="module")
def undisturbed(token_data, tmp_path_factory):
    """Options, losses, and a row of the fifth batch."""
    folder = tmp_path_factory.mktemp("healthy") / "run"
    options = [*OPTIONS, "--data", token_data]
    arguments = [*options, "--output_dir", folder]
    assert main(["train", *map(str, arguments)]) == 0
    rows = {step: ranks[0] for step, ranks in read_ledger(folder).items()}
    return options, step_metrics(folder), rows


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_skipped_step_leaves_the_weights(undisturbed, monkeypatch, tmp_path, stage):
    options, losses, rows = undisturbed
    folder = tmp_path / "run"
    bad = rows[5][3][1]
    options = [*options, "--output_dir", folder, "--deepspeed_config", stage]
    assert train_with(monkeypatch, f"nan:any:{bad}", options) == 0
    found = {m["step"]: m for m in read_metrics(folder) if "skipped_steps" in m}
    for step in range(1, 5):
        assert found[step]["loss"] == pytest.approx(losses[step], rel=1e-5)
        assert found[step]["skipped_steps"] == 0
    assert found[5]["loss"] is None and found[5]["skipped_steps"] == 1
    # Of the weights before, and so another than in the run with that update.
    assert found[6]["loss"] != pytest.approx(losses[6], rel=1e-6)
    assert found[6]["loss"] == pytest.approx(losses[6], rel=5e-2)
    assert found[STEPS]["skipped_steps"] == 1
    (entry,) = map(json.loads, (folder / "anomalies.jsonl").read_text().splitlines())
    assert (entry["step"], entry["kind"], entry["action"]) == (5, "not_finite", "skip")
    read = [row for batch in entry["rows_by_rank"][0] for row in batch["rows"]]
    assert sorted(read) == sorted(row for _, row in rows[5])


def test_rollback_leaves_the_batch_out(undisturbed, monkeypatch, tmp_path, capsys):
    options, losses, rows = undisturbed
    folder = tmp_path / "run"
    fault = f"nan:any:{rows[5][0][1]}"
    options = [*options, "--output_dir", folder, "--on_anomaly", "rollback"]
    assert train_with(monkeypatch, fault, options) == 0
    assert "3 steps done, without batch 4" in capsys.readouterr().out
    found = step_metrics(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert [found[s] for s in range(1, 5)] == [losses[s] for s in range(1, 5)]
    # From there on each step reads the batch after its own.
    ledger = {step: ranks[0] for step, ranks in read_ledger(folder).items()}
    assert ledger[4] == rows[4] and rows[5] not in ledger.values()
    assert [ledger[s] for s in range(5, 10)] == [rows[s] for s in range(6, 11)]
    # What was left out stays out where the run goes on from a checkpoint after it.
    record = folder / "checkpoints" / "step_00000006" / "checkpoint.json"
    record = json.loads(record.read_text())
    assert record["excluded_batches"] == [4]
    assert record["consumed_rows"] == 7 * 8


def test_stop(undisturbed, monkeypatch, tmp_path, capsys):
    options, _, rows = undisturbed
    folder = tmp_path / "run"
    options = [*options, "--output_dir", folder, "--on_anomaly", "stop"]
    # The message names the newest checkpoint that is complete.
    monkeypatch.setenv("FAULT_AFTER", str(checkpoint_of(folder, 3)))
    assert train_with(monkeypatch, f"nan:any:{rows[5][0][1]}", options) == 1
    error = capsys.readouterr().err
    assert "step 5: loss or gradient is not finite" in error
    assert "step_00000003" in error
    assert not (folder / "COMPLETED").exists()


@pytest.mark.slow
def test_one_rank_alone_has_all_skip(undisturbed, tmp_path):
    options, losses, rows = undisturbed
    folder = tmp_path / "run"
    fault = f"nan:any:{rows[5][3][1]}"
    train([*options, "--output_dir", folder], fault=fault)
    found = {m["step"]: m for m in read_metrics(folder) if "skipped_steps" in m}
    assert found[4]["loss"] == pytest.approx(losses[4], rel=1e-5)
    assert found[5]["loss"] is None and found[STEPS]["skipped_steps"] == 1
    entry = json.loads((folder / "anomalies.jsonl").read_text())
    read = [
        row for rank in entry["rows_by_rank"] for batch in rank for row in batch["rows"]
    ]
    assert sorted(read) == sorted(row for _, row in rows[5])


def test_a_checkpoint_keeps_what_is_usual(undisturbed, tmp_path):
    options, _, _ = undisturbed
    arguments = [*options, "--output_dir", tmp_path / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    record = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "checkpoint.json"
    health = json.loads(record.read_text())["health"]
    bounds = step_metrics(tmp_path / "run", "energy_bound_ratio")
    assert sorted(bounds) == [3, 6, 9, STEPS]
    assert all(0 < ratio <= 1 + 1e-6 for ratio in bounds.values())
    assert health["losses"] == pytest.approx(
        list(step_metrics(tmp_path / "run").values())
    )

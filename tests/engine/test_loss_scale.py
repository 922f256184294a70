"""Training in float16, whose loss scale adapts itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ten_dist.checkpoint import HealthState, LossScaleState
from ten_dist.cli import main
from ten_dist.engine import loss_scale
from ten_dist.engine.health import Health
from ten_dist.engine.loss_scale import FLOOR, GROWTH_STEPS, INITIAL, LossScale
from ten_dist.engine.step import judge as judge_step
from tests.tools.faulty_train import train_with
from tests.tools.launching import (
    SMALL_MODEL,
    read_ledger,
    step_metrics,
    train,
    train_in_turn,
)

STEPS, OVERFLOW = 6, 4
STAGES = ("zero0", "zero1", "zero2", "zero3")
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--seed", 3, "--warmup_steps", 0),
    *("--global_batch_size", 8, "--micro_batch_size", 2, "--seq_len", 32),
    *("--checkpoint_interval", 1, "--eval_rows", 2, "--num_workers", 0, "--ledger"),
]


def test_it_falls_at_once_and_rises_slowly():
    scale = LossScale()
    assert scale.value == INITIAL
    for _ in range(GROWTH_STEPS - 1):
        scale.update(False)
    scale.update(True)
    assert (scale.value, scale.overflowed_steps) == (INITIAL / 2, 1)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(False)
    assert scale.value == INITIAL / 2
    restored = LossScale(scale.state())
    for each in (scale, restored):
        each.update(False)
        assert (each.value, each.overflowed_steps) == (INITIAL, 1)
    for _ in range(40):
        scale.update(True)
    assert scale.value == FLOOR and scale.at_floor


def judge(scale, loss, norm):
    health = Health(8, HealthState())
    health.factor(torch.tensor(loss))
    return *judge_step(health, scale, loss, norm), health.skipped_steps


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_an_overflow_is_an_anomaly_only_where_no_scale_helps(norm):
    scale = LossScale()
    assert judge(scale, 3.0, norm) == (None, True, 0)
    assert scale.value == INITIAL / 2
    # A loss that is wrong says nothing about the scale.
    anomaly, overflowed, skipped = judge(scale, float("nan"), norm)
    assert anomaly.kind == "not_finite" and not overflowed and skipped == 1
    assert scale.value == INITIAL / 2
    for without in (LossScale(LossScaleState(FLOOR, 0, 0)), None):
        anomaly, overflowed, skipped = judge(without, 3.0, norm)
        assert anomaly.kind == "not_finite" and not overflowed and skipped == 1


@pytest.fixture(scope="module")
def float32(token_data, tmp_path_factory):
    """Folder of a run in float32, and {step: rows}."""
    folder = tmp_path_factory.mktemp("float32") / "run"
    options = [*OPTIONS, "--data", token_data, "--steps", STEPS]
    options += ["--precision", "fp32", "--output_dir", folder]
    assert main(["train", *map(str, options)]) == 0
    rows = {
        step: [row for _, row in by_rank[0]]
        for step, by_rank in read_ledger(folder).items()
    }
    return folder, rows


def run_options(token_data, folder, stage):
    options = [*OPTIONS, "--data", token_data, "--steps", STEPS]
    options += ["--precision", "fp16", "--deepspeed_config", stage]
    if stage == "zero3":
        options += ["--gradient_checkpointing", "block"]
    return [*options, "--output_dir", folder]


@pytest.fixture(scope="module")
def runs(token_data, float32, tmp_path_factory):
    """Folder by stage on two ranks, with an overflow on one of them, and the output."""
    folder, row = tmp_path_factory.mktemp("float16"), float32[1][OVERFLOW][5]
    folders = {stage: folder / stage for stage in STAGES}
    trainings = [run_options(token_data, folders[stage], stage) for stage in STAGES]
    return folders, train_in_turn(trainings, fault=f"overflow:any:{row}")


@pytest.mark.slow
def test_every_stage_follows_float32(runs, float32):
    """To 2e-3, as products have eleven bits; after the overflow each other."""
    exact = step_metrics(float32[0]), step_metrics(float32[0], "gradient_norm")
    until = range(1, OVERFLOW + 1)
    folders, _ = runs
    for stage, folder in folders.items():
        losses = step_metrics(folder)
        norms = step_metrics(folder, "gradient_norm")
        for step in until:
            assert losses[step] == pytest.approx(exact[0][step], abs=2e-3), stage
        assert any(losses[step] != exact[0][step] for step in until)
        for step in until[:-1]:
            assert norms[step] == pytest.approx(exact[1][step], rel=1e-2), stage
        expected = step_metrics(folders["zero0"])
        assert losses == pytest.approx(expected, abs=1e-3), stage
        # The overflow cost an update.
        assert losses[STEPS] > exact[0][STEPS] + 5e-3


def weights(folder, step):
    files = sorted((folder / "checkpoints" / f"step_{step:08d}").glob("weights-*"))
    return [load_file(file) for file in files]


def equal(one, other):
    return all(
        torch.equal(value, b[name])
        for a, b in zip(one, other)
        for name, value in a.items()
    )


@pytest.mark.slow
def test_an_overflow_on_one_rank_has_all_skip_and_halve(runs):
    folders, output = runs
    for stage, folder in folders.items():
        before, after, later = (weights(folder, OVERFLOW + i) for i in (-1, 0, 1))
        assert len(before) == 2 and equal(before, after), stage
        assert not equal(after, later), stage
        scales = list(step_metrics(folder, "loss_scale").values())
        assert scales == [INITIAL] * OVERFLOW + [INITIAL / 2] * (STEPS - OVERFLOW)
        counts = list(step_metrics(folder, "overflowed_steps").values())
        assert counts == [0] * (OVERFLOW - 1) + [1] * (STEPS - OVERFLOW + 1)
        assert set(step_metrics(folder, "skipped_steps").values()) == {0}
        assert not (folder / "anomalies.jsonl").exists()
    assert output.count(f"step {OVERFLOW}: the gradient overflowed") == len(STAGES)
    assert output.count("is for GPUs") == len(STAGES)


@pytest.mark.slow
def test_the_scale_is_that_of_the_checkpoint(runs, token_data, tmp_path):
    source, folder = runs[0]["zero2"], tmp_path / "run"
    shutil.copytree(source, folder)
    (folder / "COMPLETED").unlink()
    for step in range(OVERFLOW + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    assert "4 steps done" in train(run_options(token_data, folder, "zero2"))
    for name in ("loss", "gradient_norm", "loss_scale", "overflowed_steps"):
        assert step_metrics(folder, name) == step_metrics(source, name)


def test_a_scale_that_is_too_large_falls_until_it_fits(
    token_data, float32, monkeypatch, tmp_path, capsys
):
    """And a loss that is not a number is an anomaly all the same.

    DeepSpeed takes an autocast for the GPU's and, as it would there, switches it off.
    """
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: not device or enabled(*device)
    )
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**22)
    folder, last = tmp_path / "run", 12
    options = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    options += ["--precision", "fp16", "--steps", last, "--checkpoint_interval", last]
    row = float32[1][1][0]
    # The rows of a step do not depend on the length of the run.
    assert train_with(monkeypatch, f"nan:any:{row}", options) == 0
    scales = step_metrics(folder, "loss_scale")
    counts = step_metrics(folder, "overflowed_steps")
    assert scales[1] == scales[2] == 2.0**22
    fallen = counts[last]
    assert 2 <= fallen <= last - 3
    assert scales[last] == 2.0 ** (22 - fallen)
    (entry,) = map(json.loads, (folder / "anomalies.jsonl").read_text().splitlines())
    assert (entry["step"], entry["kind"]) == (1, "not_finite")
    assert step_metrics(folder, "skipped_steps")[last] == 1
    losses = step_metrics(folder)
    assert losses[1] is None and losses[last] < losses[2]
    # The first, second, fourth and eighth are said.
    said = capsys.readouterr().out.count("the gradient overflowed")
    assert said == fallen.bit_length()
    assert main(["generate", str(folder), "--max_new_tokens", "2"]) == 0
    assert "computing in fp32" in capsys.readouterr().err

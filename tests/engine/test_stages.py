"""Every ZeRO stage on two ranks does what plain torch does on one.

Every precision at every stage, with offload and without; offload to NVMe, which swaps
nothing of a model as small as here, is in test_nvme.py.
"""

import pytest
import torch
from safetensors.torch import load_file

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.cli import main
from ten_dist.data import Manifest, TokenReader
from tests.tools.launching import (
    SMALL_MODEL,
    read_ledger,
    step_metrics,
    train_in_turn,
)

STEPS, ROWS, SEQ_LEN = 10, 8, 48
SCALES = (1, 2, 4)
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2,4", "--energy_reg_weight", "0.02"),
    *("--steps", STEPS, "--global_batch_size", ROWS, "--seq_len", SEQ_LEN),
    *("--micro_batch_size", 2, "--warmup_steps", 3),
    *("--optimizer", "adamw", "--learning_rate", "3e-3"),
    *("--eval_rows", 5, "--eval_interval", 5, "--checkpoint_interval", 5),
    *("--seed", 5, "--ledger"),
]
# Stage 3 last: what it has DeepSpeed put in the place of torch's F.linear stays there.
STAGES = ["zero0", "zero1", "zero2", "offload", "zero3"]
# With recomputation, by precision; without it at the other stages.
RECOMPUTING = {
    "fp32": ("zero1", "offload"),
    "bf16": STAGES,
    "bf16_params": ("zero2", "offload"),
}
# DeepSpeed keeps no float32 copies of parameters at stage 0.
CASES = [
    (stage, precision)
    for stage in STAGES
    for precision in RECOMPUTING
    if (stage, precision) != ("zero0", "bf16_params")
]


@pytest.fixture(scope="module")
def all_runs(token_data, tmp_path_factory):
    """Run folder by DeepSpeed configuration and precision, on two ranks."""
    folder = tmp_path_factory.mktemp("stages")
    folders = {case: folder / "-".join(case) for case in CASES}
    train_in_turn(
        [
            *OPTIONS,
            *("--data", token_data, "--output_dir", folders[stage, precision]),
            *("--deepspeed_config", stage, "--precision", precision),
            "--gradient_checkpointing",
            "block" if stage in RECOMPUTING[precision] else "none",
        ]
        for stage, precision in CASES
    )
    return folders


@pytest.fixture(scope="module")
def runs(all_runs):
    """Run folder by DeepSpeed configuration, in float32."""
    return {stage: all_runs[stage, "fp32"] for stage in STAGES}


def plain_training(token_data, batches, precision="fp32"):
    """Metrics of the same training in torch alone, on the same rows."""
    torch.manual_seed(5)
    config = TemporalEigenstateConfig.preset(
        "pico",
        vocab_size=257,
        dim=32,
        n_layers=2,
        num_eigenstates=24,
        num_heads=2,
        hten_scales=SCALES,
        energy_reg_weight=0.02,
    )
    model = TemporalEigenstateNetwork(config)
    exempt = set(model.parameters_without_weight_decay())
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in exempt]},
            {"params": [named[n] for n in exempt], "weight_decay": 0.0},
        ],
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    reader = TokenReader(Manifest.load(token_data))
    results = {name: [] for name in ("loss", "ce_loss", "energy_loss", "gradient_norm")}
    for number, rows in enumerate(batches):
        tokens = torch.stack(
            [
                torch.from_numpy(
                    reader.read(row * SEQ_LEN, (row + 1) * SEQ_LEN + 1).astype("int64")
                )
                for row in rows
            ]
        )
        progress = torch.tensor((number - 3) / (STEPS - 1 - 3))
        cosine = 0.3e-3 + 2.7e-3 * 0.5 * (1 + torch.cos(torch.pi * progress)).item()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (number + 1) / 3 if number < 3 else cosine
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = model.compute_loss(tokens[:, :-1], tokens[:, 1:])
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured = {**losses, "gradient_norm": norm}
        for name, values in results.items():
            values.append(measured[name].item())
    return results


def rows_by_step(folder):
    ledger = read_ledger(folder)
    return [
        [
            row
            for by_rank in [ledger[step]]
            for rank in (0, 1)
            for _, row in by_rank[rank]
        ]
        for step in range(1, STEPS + 1)
    ]


@pytest.mark.slow
def test_all_stages_and_plain_torch_give_the_same_losses(runs, token_data):
    expected = plain_training(token_data, rows_by_step(runs["zero0"]))
    assert expected["loss"][-1] < expected["loss"][0] - 0.5
    for stage, folder in runs.items():
        for name, values in expected.items():
            actual = list(step_metrics(folder, name).values())
            tolerance = 1e-3 if name == "gradient_norm" else 1e-5
            assert actual == pytest.approx(values, abs=tolerance), (stage, name)


@pytest.mark.slow
def test_all_stages_read_the_same_rows_once(runs):
    reference = read_ledger(runs["zero0"])
    assert sorted(reference) == list(range(1, STEPS + 1))
    rows = [
        row for step in reference.values() for rank in step.values() for row in rank
    ]
    assert len(rows) == len(set(rows)) == STEPS * ROWS
    for stage, folder in runs.items():
        assert read_ledger(folder) == reference, stage


@pytest.mark.slow
def test_all_stages_validate_alike(runs):
    expected = step_metrics(runs["zero0"], "val_loss")
    assert sorted(expected) == [5, 10]
    for stage, folder in runs.items():
        actual = step_metrics(folder, "val_loss")
        assert actual == pytest.approx(expected, abs=1e-5), stage


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_with_recomputation_follows_plain_torch(stage, all_runs, token_data):
    batches = rows_by_step(all_runs["zero0", "fp32"])
    expected = plain_training(token_data, batches, precision="bf16")["loss"]
    actual = list(step_metrics(all_runs[stage, "bf16"]).values())
    assert actual == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_bfloat16_parameters_train_where_deepspeed_switches_autocast_off(
    stage, token_data, monkeypatch, tmp_path
):
    """As on GPUs, where it looks for an autocast of others around the engine."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: not device or enabled(*device)
    )
    options = [*OPTIONS, "--data", token_data, "--output_dir", tmp_path / "run"]
    options += ["--precision", "bf16_params", "--deepspeed_config", stage]
    assert main(["train", *map(str, options)]) == 0
    losses = step_metrics(tmp_path / "run")
    assert losses[STEPS] < losses[1] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_bfloat16_parameters_keep_the_eigenvalues_exact(stage, all_runs):
    whole, run = all_runs["zero0", "fp32"], all_runs[stage, "bf16_params"]
    expected = list(step_metrics(whole).values())
    actual = list(step_metrics(run).values())
    assert actual == pytest.approx(expected, abs=5e-2)
    exact, rounded = (
        load_file(folder / "model.safetensors") for folder in (whole, run)
    )
    for name, value in exact.items():
        if name.endswith("_base"):
            assert torch.equal(rounded[name], value), name
        # What is learned follows the float32 run, at the resolution of bfloat16.
        torch.testing.assert_close(rounded[name], value, rtol=2e-2, atol=2e-2)
    offsets = [v for n, v in rounded.items() if n.endswith("omega_offset")]
    assert all(v.abs().max() > 1e-3 for v in offsets)

"""A run that was killed ends as if it never had been."""

import json
import shutil

import pytest

from tests.tools.launching import (
    SMALL_MODEL,
    read_ledger,
    step_metrics,
    train,
    train_here,
    train_in_turn,
    train_until_killed,
)

STEPS = 16
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--dropout", 0.1, "--precision", "fp32"),
    *("--steps", STEPS, "--global_batch_size", 8, "--seq_len", 512),
    *("--warmup_steps", 3, "--eval_interval", 8, "--checkpoint_interval", 4),
    "--ledger",
]


@pytest.fixture(scope="module")
def whole_run(token_data, tmp_path_factory):
    """Options of a run on two ranks, and the folder where it ran to its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = [*OPTIONS, "--data", token_data]
    train([*options, "--output_dir", folder])
    return options, folder


@pytest.mark.slow
def test_a_killed_run_continues_exactly(whole_run, tmp_path):
    options, whole = whole_run
    options = [*options, "--output_dir", tmp_path / "run"]
    # Before the first checkpoint, between two, and, from there on, over the end of an
    # epoch.
    for step, saved in ((2, None), (6, 4), (9, 8)):
        train_until_killed(options, tmp_path / "run", step, saved)
    output = train(options)
    assert "step_00000008" in output
    expected = step_metrics(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert step_metrics(tmp_path / "run") == expected
    assert step_metrics(tmp_path / "run", "val_loss") == step_metrics(whole, "val_loss")
    ledger = read_ledger(whole)
    assert read_ledger(tmp_path / "run") == ledger
    epochs = {e for step in ledger.values() for rows in step.values() for e, _ in rows}
    assert epochs == {0, 1}


@pytest.mark.slow
def test_a_complete_run_has_nothing_left_to_do(whole_run):
    options, folder = whole_run
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert "is complete" in train_here([*options, "--output_dir", folder])
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    final = json.loads((folder / "COMPLETED").read_text())
    assert final["step"] == STEPS
    assert final["loss"] == step_metrics(folder)[STEPS]
    assert final["val_loss"] == step_metrics(folder, "val_loss")[STEPS]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(whole_run, tmp_path):
    options, whole = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "COMPLETED").unlink()
    checkpoints = folder / "checkpoints"
    cut = checkpoints / f"step_{STEPS:08d}" / "weights-00001-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = checkpoints / "step_00000012" / "moments-00001-of-00002.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1000] ^= 4
    flipped.write_bytes(content)
    output = train([*options, "--output_dir", folder])
    assert f"passing over a checkpoint: {cut} has" in output
    assert f"passing over a checkpoint: {flipped} does not have the checksum" in output
    assert "step_00000008, 8 steps done" in output
    assert step_metrics(folder) == step_metrics(whole)


@pytest.mark.slow
def test_a_run_killed_before_its_last_word_is_completed(whole_run, tmp_path):
    """All steps done and saved, but the mark of completion not yet written."""
    options, whole = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "COMPLETED").unlink()
    # Of two ranks, which then find that there is nothing left to do.
    output = train_in_turn([[*options, "--output_dir", folder]] * 2)
    assert "16 steps done" in output and "is complete" in output
    final = json.loads((folder / "COMPLETED").read_text())
    before = json.loads((whole / "COMPLETED").read_text())
    assert {**final, "train_seconds": 0} == {**before, "train_seconds": 0}


@pytest.mark.slow
def test_resume_is_exact_at_every_stage(token_data, tmp_path):
    options = {
        tmp_path / stage: [
            *SMALL_MODEL,
            *("--use_hten", "--hten_scales", "1,2", "--dropout", 0.1),
            *("--steps", 6, "--global_batch_size", 4, "--seq_len", 64),
            *("--checkpoint_interval", 3, "--deepspeed_config", stage),
            *("--precision", precision, "--data", token_data),
            *("--output_dir", tmp_path / stage),
        ]
        for stage, precision in (("zero1", "bf16"), ("zero3", "fp32"))
    }
    train_in_turn(options.values())
    expected = {folder: step_metrics(folder) for folder in options}
    for folder in options:
        shutil.rmtree(folder / "checkpoints" / "step_00000006")
        (folder / "COMPLETED").unlink()
    # In other processes.
    assert train_in_turn(options.values()).count("3 steps done") == len(options)
    for folder in options:
        assert step_metrics(folder) == expected[folder], folder

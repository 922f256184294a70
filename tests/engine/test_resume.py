"""A run that was killed ends as if it never had been."""

import json
import shutil

import pytest

from tests.tools.launching import (
    SMALL_MODEL,
    checkpoint_of,
    read_ledger,
    step_metrics,
    train,
    train_here,
    train_in_turn,
    train_until_killed,
)

STEPS = 16
MODEL = [*SMALL_MODEL, "--use_hten", "--hten_scales", "1,2", "--dropout", 0.1]
OPTIONS = [
    *MODEL,
    *("--steps", STEPS, "--global_batch_size", 8, "--seq_len", 512),
    *("--warmup_steps", 3, "--eval_interval", 8, "--checkpoint_interval", 4),
    *("--precision", "fp32", "--ledger"),
]
# Shorter runs, by stage.
PRECISIONS = {"zero1": "bf16", "zero3": "fp32"}


@pytest.fixture(scope="module")
def whole_runs(token_data, tmp_path_factory):
    """Options of runs on two ranks without --output_dir, and the folders where they ran to
    their ends: one with OPTIONS, then one at each stage."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {folder / "run": [*OPTIONS, "--data", token_data]}
    for stage, precision in PRECISIONS.items():
        runs[folder / stage] = [
            *(*MODEL, "--steps", 6, "--global_batch_size", 4, "--seq_len", 64),
            *("--checkpoint_interval", 3, "--deepspeed_config", stage),
            *("--precision", precision, "--data", token_data),
        ]
    train_in_turn([*run, "--output_dir", place] for place, run in runs.items())
    return [(options, place) for place, options in runs.items()]


@pytest.fixture(scope="module")
def whole_run(whole_runs):
    return whole_runs[0]


@pytest.fixture(scope="module")
def continued(whole_runs, tmp_path_factory):
    """Copies of the whole runs by name, with what was done last gone or damaged, after they
    were continued in new processes, and what those printed."""
    folder = tmp_path_factory.mktemp("continued")
    trainings, names = [], ["damaged", "unmarked", *PRECISIONS]
    for name, (options, whole) in zip(names, [whole_runs[0], *whole_runs], strict=True):
        shutil.copytree(whole, folder / name)
        (folder / name / "COMPLETED").unlink()
        trainings.append([*options, "--output_dir", folder / name])
    for stage in PRECISIONS:
        shutil.rmtree(checkpoint_of(folder / stage, 6))
    cut, flipped = damaged_files(folder / "damaged")
    cut.write_bytes(cut.read_bytes()[:-100])
    content = bytearray(flipped.read_bytes())
    content[-1000] ^= 4
    flipped.write_bytes(content)
    # What is complete then has nothing left to do, which two ranks have to agree on.
    return folder, train_in_turn([*trainings, trainings[1]])


def damaged_files(folder):
    """The one that is cut, in the newest checkpoint, and that with another bit."""
    return (
        checkpoint_of(folder, STEPS) / "weights-00001-of-00002.safetensors",
        checkpoint_of(folder, 12) / "moments-00001-of-00002.safetensors",
    )


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
def test_a_damaged_checkpoint_is_passed_over(whole_run, continued):
    folder, output = continued
    cut, flipped = damaged_files(folder / "damaged")
    assert f"passing over a checkpoint: {cut} has" in output
    assert f"passing over a checkpoint: {flipped} does not have the checksum" in output
    assert "step_00000008, 8 steps done" in output
    assert step_metrics(folder / "damaged") == step_metrics(whole_run[1])


@pytest.mark.slow
def test_a_run_killed_before_its_last_word_is_completed(whole_run, continued):
    """All steps done and saved, but the mark of completion not yet written."""
    folder, output = continued
    final, before = (
        json.loads((run / "COMPLETED").read_text())
        for run in (folder / "unmarked", whole_run[1])
    )
    assert {**final, "train_seconds": 0} == {**before, "train_seconds": 0}
    assert f"{STEPS} steps done" in output and "is complete" in output


@pytest.mark.slow
def test_resume_is_exact_at_every_stage(whole_runs, continued):
    folder, output = continued
    assert output.count("3 steps done") == len(PRECISIONS)
    for stage, (_, whole) in zip(PRECISIONS, whole_runs[1:], strict=True):
        assert step_metrics(folder / stage) == step_metrics(whole), stage

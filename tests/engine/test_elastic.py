"""A run goes on with other numbers of ranks, ZeRO stages and micro-batches."""

import json

import pytest

from ten_dist.cli import main
from tests.tools.launching import (
    SMALL_MODEL,
    from_step_four,
    read_ledger,
    step_metrics,
    train_here,
    train_in_turn,
    train_until_killed,
)

pytestmark = pytest.mark.slow

STEPS = 12
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--dropout", 0.1, "--ledger"),
    *("--steps", STEPS, "--global_batch_size", 8, "--seq_len", 64),
    *("--warmup_steps", 3, "--checkpoint_interval", 4, "--num_workers", 0),
]


# Options that replace those of OPTIONS, by the name of a run, which begins with its stage.
RUNS = {
    "zero2": ("--precision", "fp32", "--micro_batch_size", 2),
    # Dropout masks are drawn a micro-batch at a time, so this is without any.
    "zero1": ("--precision", "fp32", "--dropout", 0),
    "zero3": ("--precision", "bf16_params", "--micro_batch_size", 2),
    # Eigenstates with and without vectors, and matrices that Muon gathers from the ranks.
    "zero3, matrix layers": (
        *("--precision", "fp32", "--micro_batch_size", 2, "--optimizer", "muon"),
        *("--state_dim", 4, "--matrix_layers", 1, "--seq_len", 32),
    ),
}


@pytest.fixture(scope="module")
def runs(token_data, tmp_path_factory):
    """By name the options of a run of two ranks, and the folder where it ran to its end."""
    folder = tmp_path_factory.mktemp("elastic")
    found = {
        name: ([*OPTIONS, *more, "--data", token_data], folder / name)
        for name, more in RUNS.items()
    }
    train_in_turn(
        [*options, "--output_dir", place, "--deepspeed_config", name.split(",")[0]]
        for name, (options, place) in found.items()
    )
    return found


@pytest.fixture(scope="module")
def run(runs):
    return runs["zero2"]


def rows(folder):
    """{step: sorted rows} over all ranks."""
    ledger = read_ledger(folder)
    return {
        step: sorted(row for of_rank in ranks.values() for row in of_rank)
        for step, ranks in ledger.items()
    }


def test_same_losses_on_one_rank_with_offload(run, tmp_path):
    options, source = run
    folder = from_step_four(source, tmp_path / "run")
    options = [*options, "--output_dir", folder, "--deepspeed_config", "offload"]
    assert "4 steps done" in train_here(options)
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)
    assert rows(folder) == rows(source)


def test_same_losses_with_other_micro_batches(runs, tmp_path):
    options, source = runs["zero1"]
    folder = from_step_four(source, tmp_path / "run")
    train_here([*options, "--output_dir", folder, "--micro_batch_size", 1])
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)


def test_bfloat16_parameters_keep_their_float32_copies(runs, tmp_path):
    options, source = runs["zero3"]
    folder = from_step_four(source, tmp_path / "run")
    train_here([*options, "--output_dir", folder, "--deepspeed_config", "zero1"])
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=2e-3)


def test_matrix_layers_go_on_on_one_rank(runs, tmp_path):
    options, source = runs["zero3, matrix layers"]
    folder = from_step_four(source, tmp_path / "run")
    train_here([*options, "--output_dir", folder, "--deepspeed_config", "zero0"])
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)
    assert rows(folder) == rows(source)


def test_killed_again_and_again_each_time_going_on_elsewhere(run, tmp_path):
    options, source = run
    folder = tmp_path / "run"
    options = [*options, "--output_dir", folder]
    for step, saved, ranks, stage in (
        (2, None, 0, "zero2"),
        (6, 4, 2, "zero1"),
        (9, 8, 4, "zero3"),
    ):
        given = [*options, "--deepspeed_config", stage]
        train_until_killed(given, folder, step, saved, ranks=ranks)
    output = train_here([*options, "--deepspeed_config", "zero0"])
    assert "continuing from" in output
    assert step_metrics(folder) == pytest.approx(step_metrics(source), rel=1e-5)
    assert rows(folder) == rows(source)


def test_weights_that_compute_something_else_are_refused(run, tmp_path, capsys):
    """Checksums are right, as after a loader that forgot a tensor."""
    options, source = run
    folder = from_step_four(source, tmp_path / "run")
    record_file = folder / "checkpoints" / "step_00000004" / "checkpoint.json"
    record = json.loads(record_file.read_text())
    record["probe_loss"] *= 1.001
    del record["crc32"]
    record_file.write_text(json.dumps(record))
    arguments = [*options, "--output_dir", folder]
    assert main(["train", *map(str, arguments)]) == 1
    assert "the loaded weights are not those that were saved" in capsys.readouterr().err

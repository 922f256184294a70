"""The cost of a run in its metrics, on TensorBoard and at its end, over several starts."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ten_dist.cli import main
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError
from tests.tools.launching import SMALL_MODEL, read_metrics


def arguments(data, folder, *more):
    return [
        "train",
        *SMALL_MODEL,
        *map(str, ("--data", data, "--output_dir", folder, "--steps", 6)),
        *map(str, ("--seq_len", 32, "--global_batch_size", 4, "--num_workers", 0)),
        *map(str, ("--precision", "fp32", "--checkpoint_interval", 2, *more)),
    ]


def dollars(folder):
    return [m["dollars"] for m in read_metrics(folder) if "dollars" in m]


def test_dollars_add_up_over_starts(tmp_path, token_data, capsys):
    folder = tmp_path / "run"
    priced = arguments(token_data, folder, "--dollars_per_hour", "3600")
    assert main(priced) == 0
    first = dollars(folder)
    # One before the first step, and one a step.
    assert len(first) == 7 and first == sorted(first) and first[0] > 0
    steps = [m for m in read_metrics(folder) if "estimated_dollars" in m]
    assert all(m["estimated_dollars"] >= m["dollars"] for m in steps)
    assert steps[-1]["estimated_dollars"] == steps[-1]["dollars"]
    # At a dollar a second, steps cost what they took, and what was between them.
    took = sum(m["step_seconds"] for m in steps[1:])
    assert steps[-1]["dollars"] - steps[0]["dollars"] >= took
    completed = json.loads((folder / "COMPLETED").read_text())
    assert completed["dollars"] >= first[-1]
    assert f"{completed['dollars']:.2f} dollars" in capsys.readouterr().out
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = events.Scalars("cost/dollars")
    assert [s.value for s in scalars] == pytest.approx(first, rel=1e-6)

    # As if it had been killed after step 5: one step is done again, and paid again.
    (folder / "COMPLETED").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (folder / "metrics.jsonl").write_text("".join(kept))
    (newest,) = folder.glob("checkpoints/step_00000006")
    newest.rename(tmp_path / "elsewhere")
    (folder / "checkpoints" / "latest").write_text("step_00000004\n")
    assert main(priced) == 0
    again = dollars(folder)
    assert again == sorted(again)
    # What was written up to the checkpoint stays; the next line, before a step is done, is
    # of more than all that the start before had spent when it was killed.
    assert first[:5] == again[:5]
    assert again[5] > first[5]


def test_without_a_price_nothing_is_said(tmp_path, token_data):
    folder = tmp_path / "run"
    assert main(arguments(token_data, folder)) == 0
    assert dollars(folder) == []
    assert "dollars" not in json.loads((folder / "COMPLETED").read_text())


@pytest.mark.parametrize("price", [0.0, -1.0, float("inf"), float("nan")])
def test_a_price_is_more_than_nothing(price):
    with pytest.raises(ConfigurationError, match="--dollars_per_hour"):
        TrainingConfig(dry_run=True, dollars_per_hour=price)

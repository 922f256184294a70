"""The quality experiments: sizes are equal, training goes on where it was, results are kept."""

import dataclasses
import math

import pytest
import torch

from benchmarks import fitting
from benchmarks.experiments import make_experiment
from benchmarks.fitting import Recipe, fit, make_model
from benchmarks.quality_results import Results, curves, table
from benchmarks.tasks import Characters
from ten_dist import TemporalEigenstateConfig

SMALL = TemporalEigenstateConfig(
    dim=16, n_layers=1, num_eigenstates=8, num_heads=2, max_timescale=16
)
RECIPE = Recipe(steps=60, rows=8, warmup_steps=10, learning_rate=1e-2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("to be or not to be " * 200)
    return path


@pytest.mark.parametrize(
    "name",
    ["characters-tuned", "characters-256-tuned", "mqar", "parity", "permutation"],
)
def test_models_that_are_compared_are_of_one_size(name, tmp_path):
    # As many characters as tinyshakespeare has.
    (tmp_path / "text").write_text("".join(map(chr, range(100, 165))) * 20)
    experiment = make_experiment(name, tmp_path / "text", None)
    sizes = {}
    for variant, config in experiment.variants.items():
        config = dataclasses.replace(config, vocab_size=experiment.task.vocab_size)
        sizes[variant] = make_model(config).num_parameters()
    ten = next(size for variant, size in sizes.items() if variant.startswith("TEN"))
    assert all(abs(size / ten - 1) < 0.01 for size in sizes.values()), sizes
    if not name.startswith("characters"):
        assert max(sizes.values()) < 140_000


def test_the_held_out_tenth_of_a_text_is_never_trained_on(tmp_path):
    text = tmp_path / "text"
    text.write_text("ab" * 450 + "cd" * 50)
    task = Characters(text, context=8)
    seen = torch.cat([x.flatten() for x, _ in task.batches(16, 50, seed=0)])
    assert set(seen.tolist()) == {0, 1}
    inputs, targets = next(iter(task.batches(16, 1, seed=0)))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_model_that_fits_ends_below_chance(text):
    figures = fit(SMALL, Characters(text, context=16), RECIPE, seed=0)
    assert figures["loss"] < 0.5 * math.log(8)
    again = fit(SMALL, Characters(text, context=16), RECIPE, seed=0)
    assert again["loss"] == figures["loss"]


def test_a_curve_has_its_points_and_ends_with_the_training(text):
    recipe = dataclasses.replace(RECIPE, evaluations=3)
    figures = fit(SMALL, Characters(text, context=16), recipe, seed=0)
    steps, seconds, losses = zip(*figures["curve"])
    assert steps == (20, 40, 60)
    assert list(seconds) == sorted(seconds) and seconds[-1] == figures["seconds"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("muon", [None, 8e-3])
def test_a_training_that_was_stopped_ends_as_if_it_was_not(
    text, tmp_path, muon, monkeypatch
):
    task = Characters(text, context=16)
    recipe = dataclasses.replace(RECIPE, muon_learning_rate=muon, evaluations=3)
    whole = fit(SMALL, task, recipe, seed=0)
    monkeypatch.setattr(fitting, "SECONDS_UNSAVED", 0.0)
    checkpoint = tmp_path / "unfinished" / "run.pt"

    class Stopping:
        vocab_size, quick_loss = task.vocab_size, staticmethod(task.quick_loss)

        def batches(self, rows, steps, seed):
            for step, batch in enumerate(task.batches(rows, steps, seed)):
                if step == 30:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        fit(SMALL, Stopping(), recipe, seed=0, checkpoint=checkpoint)
    assert checkpoint.is_file()
    rest = fit(SMALL, task, recipe, seed=0, checkpoint=checkpoint)
    assert rest["loss"] == whole["loss"]
    assert [point[0] for point in rest["curve"]] == [20, 40, 60]
    assert not checkpoint.exists()


def test_results_are_kept_and_averaged(tmp_path):
    results = Results(tmp_path / "quality.json")
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        results.add("paper", seed, {"loss": loss, "parameters": 1234.0})
    again = Results(tmp_path / "quality.json")
    assert again.runs("paper")["1"]["loss"] == pytest.approx(2.0)
    line = table(again, "recall", ["paper", "not run"]).splitlines()[-1]
    assert line == "| paper | 3 | 1,234 | 2.0000 ± 1.0000 |"


def test_older_runs_without_seconds_stay_in_the_table(tmp_path):
    results = Results(tmp_path / "quality.json")
    results.add("old", 0, {"loss": 2.0, "parameters": 10})
    results.add("new", 0, {"loss": 1.5, "seconds": 61.4, "parameters": 10})
    lines = table(results, "characters", ["old", "new"]).splitlines()
    assert lines[2:] == [
        "| old | 1 | 10 | 2.0000 | - |",
        "| new | 1 | 10 | 1.5000 | 61 |",
    ]
    assert results.content["cores"] >= 1 and results.content["cpu"]


def test_curves_tell_how_long_each_takes_to_the_end_of_the_best_transformer(tmp_path):
    results = Results(tmp_path / "quality.json")
    ends = {"TEN": 1.0, "transformer: 1": 1.9, "transformer: 2": 2.2, "minGRU": 2.0}
    for seconds, (variant, end) in enumerate(ends.items(), start=1):
        curve = [[1, 10.0 * seconds, 1.5 + end / 10], [2, 20.0 * seconds, end]]
        results.add(variant, 0, {"curve": curve, "parameters": 1})
    results.add("old", 0, {"loss": 1.0, "parameters": 1})
    lines = curves(results, "it", [*ends, "old"]).splitlines()
    assert lines[0] == "| it: curves | last loss | seconds to that of transformer: 1 |"
    assert lines[2:] == [
        "| TEN | 1.0000 | 10 |",
        "| transformer: 1 | 1.9000 | 20 |",
        "| transformer: 2 | 2.2000 | 30 |",
        "| minGRU | 2.0000 | 40 |",
    ]
    assert not curves(results, "it", ["TEN", "old"])

"""The quality experiments: their tasks ask what they say, and results are kept."""

import math

import pytest
import torch

from benchmarks.fitting import Recipe, fit
from benchmarks.quality import Results, table
from benchmarks.tasks import AssociativeRecall, Characters, SelectiveCopying
from ten_dist import TemporalEigenstateConfig
from ten_dist.config.model import IGNORED_TARGET


def test_recall_asks_each_key_for_its_value():
    inputs, targets = AssociativeRecall().draw(5, 8, torch.Generator().manual_seed(0))
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        value_of = dict(zip(row[:16:2], row[1:16:2]))
        assert len(value_of) == 8
        asked = {row[i]: answers[i] for i in range(32) if answers[i] != IGNORED_TARGET}
        assert asked == value_of
        # The answer is not to be seen where it is asked for.
        assert answers[:16] == [IGNORED_TARGET] * 16


def test_copying_asks_for_the_symbols_in_their_order():
    task = SelectiveCopying()
    inputs, targets = task.draw(5, 4, torch.Generator().manual_seed(0))
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        symbols = [token for token in row[: task.LENGTH] if token < task.SYMBOLS]
        assert len(symbols) == 4 and answers[task.LENGTH :] == symbols
        assert answers[: task.LENGTH] == [IGNORED_TARGET] * task.LENGTH


def test_the_held_out_tenth_of_a_text_is_never_trained_on(tmp_path):
    text = tmp_path / "text"
    text.write_text("ab" * 450 + "cd" * 50)
    task = Characters(text, context=8)
    seen = torch.cat([x.flatten() for x, _ in task.batches(16, 50, seed=0)])
    assert set(seen.tolist()) == {0, 1}
    inputs, targets = next(iter(task.batches(16, 1, seed=0)))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_model_that_fits_ends_below_chance(tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 200)
    config = TemporalEigenstateConfig(
        dim=16, n_layers=1, num_eigenstates=8, num_heads=2, max_timescale=16
    )
    recipe = Recipe(steps=60, rows=8, warmup_steps=10, learning_rate=1e-2)
    figures = fit(config, Characters(text, context=16), recipe, seed=0)
    assert figures["loss"] < 0.5 * math.log(8)
    again = fit(config, Characters(text, context=16), recipe, seed=0)
    assert again["loss"] == figures["loss"]


def test_results_are_kept_and_averaged(tmp_path):
    results = Results(tmp_path / "quality.json")
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        results.add("paper", seed, {"loss": loss, "parameters": 1234.0})
    again = Results(tmp_path / "quality.json")
    assert again.runs("paper")["1"]["loss"] == pytest.approx(2.0)
    line = table(again, "recall", ["paper", "not run"]).splitlines()[-1]
    assert line == "| paper | 3 | 1,234 | 2.0000 ± 1.0000 |"

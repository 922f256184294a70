"""Batch arithmetic, length and learning rate."""

import pytest

from ten_dist.config.training import TrainingConfig
from ten_dist.data import Manifest
from ten_dist.errors import ConfigurationError
from ten_dist.schedule import make_schedule


def training(**options):
    return TrainingConfig(**{"data": "d", "output_dir": "o", "seq_len": 64, **options})


@pytest.mark.parametrize(
    ("global_batch", "micro", "world", "expected"),
    [
        (32, 4, 2, (4, 4)),
        (32, None, 2, (8, 2)),
        (6, None, 2, (3, 1)),
        (7, 7, 1, (7, 1)),
    ],
)
def test_global_is_micro_times_accumulation_times_world(
    global_batch, micro, world, expected
):
    schedule = make_schedule(
        training(global_batch_size=global_batch, micro_batch_size=micro, steps=1),
        world,
        None,
    )
    assert (schedule.micro_batch_size, schedule.accumulation_steps) == expected
    assert expected[0] * expected[1] * world == schedule.global_batch_size


@pytest.mark.parametrize(
    ("global_batch", "micro", "world"), [(7, None, 2), (8, 3, 2), (8, 8, 2)]
)
def test_what_does_not_divide_is_refused(global_batch, micro, world):
    options = training(global_batch_size=global_batch, micro_batch_size=micro, steps=1)
    with pytest.raises(ConfigurationError, match="global_batch_size"):
        make_schedule(options, world, None)


def test_length_in_steps_tokens_or_epochs(token_data):
    manifest = Manifest.load(token_data)
    rows = manifest.rows(64)
    assert make_schedule(training(steps=9), 1, manifest).steps == 9
    # 32 rows x 64 tokens a step, rounded up.
    assert make_schedule(training(tokens=32 * 64 * 5 + 1), 1, manifest).steps == 6
    assert make_schedule(training(epochs=2.0), 1, manifest).steps == -(-2 * rows // 32)
    assert make_schedule(training(), 1, manifest).steps == -(-rows // 32)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    options = training(
        steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2
    )
    schedule = make_schedule(options, 1, None)
    assert [schedule.learning_rate(s) for s in (0, 4, 9)] == pytest.approx(
        [0.1, 0.5, 1.0]
    )
    assert schedule.learning_rate(10) == pytest.approx(1.0)
    middle = 10 + (99 - 10) / 2
    assert schedule.learning_rate(middle) == pytest.approx(0.6)
    assert schedule.learning_rate(99) == pytest.approx(0.2)


def test_description_shows_the_arithmetic(token_data):
    schedule = make_schedule(
        training(steps=10, global_batch_size=32, micro_batch_size=4),
        2,
        Manifest.load(token_data),
    )
    text = "\n".join(schedule.describe())
    assert "32 rows = 4 a micro-batch x 4 accumulations x 2 ranks" in text
    assert "32 rows x 64 tokens = 2,048 tokens" in text
    assert "10 steps x 2,048 = 20,480 tokens" in text

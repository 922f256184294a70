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


def rates(schedule, steps=20, **options):
    """Learning rates of all steps of a run with a peak of 1, a warm-up of 4 steps."""
    options = {"learning_rate": 1.0, "warmup_steps": 4, **options}
    plan = make_schedule(training(steps=steps, schedule=schedule, **options), 1, None)
    return [plan.learning_rate(step) for step in range(steps)]


def test_linear_falls_to_zero_or_to_the_minimum():
    found = rates("linear")
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    # Fifteen equal steps down from the fifth.
    assert found[5] == pytest.approx(14 / 15) and found[10] == pytest.approx(9 / 15)
    assert found[19] == 0
    assert rates("linear", min_learning_rate=0.4)[19] == pytest.approx(0.4)


def test_wsd_stays_at_the_peak_and_decays_at_the_end():
    found = rates("wsd")
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:16] == [1.0] * 12
    # A fifth of the run: 1 - sqrt of 1/4, 2/4, 3/4 and 4/4.
    assert found[16:] == pytest.approx([0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0])
    least = rates("wsd", decay_fraction=0.8, min_learning_rate=0.2)
    assert least[3] == 1 and least[4] == pytest.approx(0.2 + 0.8 * 0.75)
    assert least[19] == pytest.approx(0.2)
    # However short, the last step has the minimum.
    assert rates("wsd", decay_fraction=0.01)[18:] == [1.0, 0.0]


def test_constant_and_inverse_sqrt_do_not_depend_on_the_length():
    assert rates("constant") == [0.25, 0.5, 0.75] + [1.0] * 17
    found = rates("inverse_sqrt")
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx((4 / 5) ** 0.5)
    assert found[15] == pytest.approx(0.5)
    assert rates("inverse_sqrt", min_learning_rate=0.6)[15] == 0.6
    for schedule in ("constant", "inverse_sqrt"):
        assert rates(schedule, 50)[:20] == rates(schedule)
    assert rates("wsd", 50)[:16] == rates("wsd")[:16]


def test_a_plateau_has_a_warm_up_of_the_same_length_in_every_run():
    def warmup(schedule, steps, **options):
        options = training(schedule=schedule, steps=steps, **options)
        return make_schedule(options, 1, None).warmup_steps

    assert [warmup("wsd", n) for n in (100, 100_000)] == [40, 40]
    assert warmup("constant", 5000, adam_beta2=0.99) == 200
    assert warmup("inverse_sqrt", 5000) == 4000
    assert [warmup("linear", n) for n in (100, 100_000)] == [10, 2000]
    with pytest.raises(ConfigurationError, match="40, the default with"):
        warmup("wsd", 40)
    assert warmup("wsd", 40, warmup_steps=32) == 32
    with pytest.raises(ConfigurationError, match="--decay_fraction 0.2 of 40 steps"):
        warmup("wsd", 40, warmup_steps=33)


def test_description_names_the_schedule():
    def described(schedule, **options):
        options = training(
            schedule=schedule, steps=100, warmup_steps=25, learning_rate=1e-3, **options
        )
        return make_schedule(options, 1, None).describe_learning_rate()

    assert described("cosine") == "25 steps up to 0.001, then a cosine to 0.0001"
    assert described("linear").endswith("then a line to 0")
    assert "0.001 up to step 80, then 1 - sqrt over 20 steps to 0" in described("wsd")
    assert described("constant").endswith("then constant")
    assert "to 0.0005 at the end" in described("inverse_sqrt")


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

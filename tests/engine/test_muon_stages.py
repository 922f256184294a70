"""Muon on any number of ranks at any ZeRO stage does what it does in one process."""

import pytest

from tests.tools.launching import (
    SMALL_MODEL,
    from_step_four,
    step_metrics,
    train_here,
    train_in_turn,
)

STEPS = 12
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--optimizer", "muon"),
    *("--steps", STEPS, "--global_batch_size", 8, "--micro_batch_size", 1),
    *("--seq_len", 48, "--warmup_steps", 3, "--checkpoint_interval", 4),
    *("--learning_rate", 3e-3, "--muon_learning_rate", 2e-2),
    *("--precision", "fp32", "--num_workers", 0, "--data_verification", "size"),
]
STAGES = ("zero0", "zero1", "zero2", "offload", "zero3")


@pytest.fixture(scope="module")
def train_on(token_data, tmp_path_factory):
    """A function that trains at several stages on so many ranks; folders by stage."""

    def train(ranks, stages, *more):
        folder = tmp_path_factory.mktemp(f"muon_{ranks}_ranks")
        given = [*OPTIONS, *more, "--data", token_data]
        runs = [
            [*given, "--output_dir", folder / stage, "--deepspeed_config", stage]
            for stage in stages
        ]
        if ranks == 1:
            for run in runs:
                train_here(run)
        else:
            train_in_turn(runs, ranks=ranks)
        return {stage: folder / stage for stage in stages}

    return train


@pytest.fixture(scope="module")
def single(train_on):
    """The folder of a run in one process without ZeRO."""
    return train_on(1, ["zero0"])["zero0"]


@pytest.fixture(scope="module")
def on_two_ranks(train_on):
    return train_on(2, STAGES)


def assert_same_losses(folder, single):
    losses = step_metrics(folder)
    assert len(losses) == STEPS
    assert losses == pytest.approx(step_metrics(single), abs=1e-5), folder


def test_two_ranks_train_as_one_process(single, on_two_ranks):
    for folder in on_two_ranks.values():
        assert_same_losses(folder, single)
    losses = step_metrics(single)
    assert losses[STEPS] < losses[1] - 0.8


@pytest.mark.slow
def test_four_ranks_train_as_one_process(single, train_on):
    for folder in train_on(4, STAGES).values():
        assert_same_losses(folder, single)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_two_ranks(
    stage, single, on_two_ranks, token_data, tmp_path
):
    """Each on the stage after its own."""
    folder = from_step_four(on_two_ranks[stage], tmp_path / "run")
    onto = STAGES[(STAGES.index(stage) + 1) % len(STAGES)]
    options = [*OPTIONS, "--data", token_data]
    options += ["--output_dir", folder, "--deepspeed_config", onto]
    assert "4 steps done" in train_here(options)
    assert_same_losses(folder, single)

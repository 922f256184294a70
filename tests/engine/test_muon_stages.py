"""Muon on any number of ranks at any ZeRO stage does what it does in one process."""

import json
import shutil

import pytest

from ten_dist.checkpoint import EXP_AVG, MOMENTUM, CheckpointReader
from ten_dist.cli import main
from ten_dist.deepspeed_config import SHIPPED_CONFIGS
from ten_dist.errors import ConfigurationError
from tests.tools.launching import (
    SMALL_MODEL,
    checkpoint_of,
    from_step_four,
    step_metrics,
    train_here,
    train_in_turn,
)

STEPS = 12
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--optimizer", "muon"),
    *("--steps", STEPS, "--global_batch_size", 8, "--micro_batch_size", 2),
    *("--seq_len", 48, "--warmup_steps", 3, "--checkpoint_interval", 4),
    *("--learning_rate", 3e-3, "--muon_learning_rate", 2e-2),
    *("--precision", "fp32", "--num_workers", 0, "--data_verification", "size"),
]
STAGES = ("zero0", "zero1", "zero2", "offload", "zero3")
GONE_ON_FROM = {"zero0": "zero1", "zero2": "offload", "zero3": "zero0"}
"""Stages of runs on two ranks, and those on which one process goes on with them."""
# At stage 1 parameters in bfloat16 are updated by an optimizer of DeepSpeed's of their own.
PRECISIONS = [("bf16_params", "zero1"), ("fp16", "zero2")]


@pytest.fixture(scope="module")
def given(token_data):
    return [*OPTIONS, "--data", token_data]


@pytest.fixture(scope="module")
def single(given, tmp_path_factory):
    """The folder of a run in one process without ZeRO."""
    folder = tmp_path_factory.mktemp("muon") / "single"
    train_here([*given, "--output_dir", folder, "--deepspeed_config", "zero0"])
    return folder


@pytest.fixture(scope="module")
def small_groups(tmp_path_factory):
    """A file of stage 3 with many sub-groups, which are updated one after the other, and
    without parameters that stay whole."""
    content = json.loads((SHIPPED_CONFIGS / "offload.json").read_text())
    content["zero_optimization"] |= {
        "sub_group_size": 9000,
        "stage3_param_persistence_threshold": 10,
    }
    file = tmp_path_factory.mktemp("config") / "small_groups.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def on_two_ranks(given, single, small_groups, tmp_path_factory):
    """Folders of runs on two ranks: in float32 from the start, or from step four of that in
    one process, by stage; and of those in other precisions."""
    folder = tmp_path_factory.mktemp("two_ranks")
    trainings = []

    def run(name, stage, *more):
        place = folder / name
        options = [*given, "--output_dir", place, "--deepspeed_config", stage, *more]
        if name not in GONE_ON_FROM:
            options += ["--checkpoint_interval", STEPS]
        trainings.append(options)
        return place

    # First: DeepSpeed checks a file of one's own only before there are ranks.
    new = {"small groups": run("small_groups", small_groups)}
    new |= {stage: run(stage, stage) for stage in STAGES}
    resumed = {stage: run(f"to_{stage}", stage) for stage in ("offload", "zero3")}
    for place in resumed.values():
        from_step_four(single, place)
    others = {
        case: run("-".join(case), case[1], "--precision", case[0])
        for case in PRECISIONS
    }
    train_in_turn(trainings)
    return new, resumed, others


def assert_same_losses(folder, single):
    losses = step_metrics(folder)
    assert len(losses) == STEPS
    assert losses == pytest.approx(step_metrics(single), abs=1e-5), folder


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_one_process_trains_alike_with_zero(stage, single, given, tmp_path):
    train_here([*given, "--output_dir", tmp_path / "run", "--deepspeed_config", stage])
    assert_same_losses(tmp_path / "run", single)
    losses = step_metrics(single)
    assert losses[STEPS] < losses[1] - 0.8


@pytest.mark.slow
def test_two_ranks_train_as_one_process(single, on_two_ranks):
    new, resumed, _ = on_two_ranks
    for folder in (*new.values(), *resumed.values()):
        assert_same_losses(folder, single)


@pytest.mark.slow
def test_four_ranks_train_as_one_process(single, given, tmp_path):
    stages = ("zero1", "zero3")
    train_in_turn(
        [
            [
                *given,
                *("--output_dir", tmp_path / stage, "--deepspeed_config", stage),
                *("--checkpoint_interval", STEPS),
            ]
            for stage in stages
        ],
        ranks=4,
    )
    for stage in stages:
        assert_same_losses(tmp_path / stage, single)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "onto"), GONE_ON_FROM.items())
def test_one_process_goes_on_from_two_ranks(
    stage, onto, single, on_two_ranks, given, tmp_path
):
    new, _, _ = on_two_ranks
    folder = from_step_four(new[stage], tmp_path / "run")
    options = [*given, "--output_dir", folder, "--deepspeed_config", onto]
    assert "4 steps done" in train_here(options)
    assert_same_losses(folder, single)


@pytest.mark.slow
def test_other_precisions_stay_near_float32(single, on_two_ranks):
    _, _, others = on_two_ranks
    for case, folder in others.items():
        found, expected = step_metrics(folder), step_metrics(single)
        assert found == pytest.approx(expected, abs=5e-2), case


def test_a_checkpoint_has_one_moment_of_a_matrix(single):
    with CheckpointReader(checkpoint_of(single, 4)) as reader:
        matrices, others = 0, 0
        for name, shape in reader.shapes.items():
            if name.endswith(("input_weight", "output_weight", "up.weight")):
                assert reader.tensor(MOMENTUM, name).any()
                with pytest.raises(ConfigurationError):
                    reader.tensor(EXP_AVG, name)
                matrices += shape.numel()
            elif not name.endswith(("_base", "weight")):
                assert reader.tensor(EXP_AVG, name).shape == shape
                others += 1
        assert matrices and others


def test_moments_of_another_optimizer_are_refused(single, given, tmp_path, capsys):
    options = [*given, "--output_dir", tmp_path / "run"]
    options += ["--resume", checkpoint_of(single, 4)]
    place = options.index("--muon_learning_rate")
    del options[place : place + 2]
    options[options.index("--optimizer") + 1] = "adamw"
    assert main(["train", *map(str, options)]) == 2
    assert "optimizer was muon, now adamw" in capsys.readouterr().err


def test_runs_from_before_the_option_go_on_with_adamw(token_data, tmp_path):
    options = [*SMALL_MODEL, "--data", token_data, "--output_dir", tmp_path]
    options += ["--steps", 2, "--seq_len", 32, "--global_batch_size", 2]
    options += ["--checkpoint_interval", 1, "--num_workers", 0]
    options += ["--optimizer", "adamw"]
    train_here(options)
    (tmp_path / "COMPLETED").unlink()
    shutil.rmtree(checkpoint_of(tmp_path, 2))
    files = (tmp_path / "config.json", checkpoint_of(tmp_path, 1) / "checkpoint.json")
    for file, key in zip(files, ("identity", "state_identity")):
        content = json.loads(file.read_text())
        assert content[key].pop("optimizer") == "adamw"
        content.pop("crc32", None)
        file.write_text(json.dumps(content))
    assert "1 steps done" in train_here(options)

"""`--extend`: a run is made longer, and goes on as if it had always been."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from ten_dist.cli import main
from ten_dist.run_folder import RunFolder
from tests.tools.launching import (
    SMALL_MODEL,
    checkpoint_of,
    read_ledger,
    step_metrics,
    train_here,
    train_in_turn,
)

STEPS = 12
OPTIONS = [
    *SMALL_MODEL,
    *("--hten_scales", "1,2", "--dropout", 0.1, "--precision", "fp32", "--ledger"),
    *("--global_batch_size", 24, "--seq_len", 256, "--num_workers", 0),
    *("--checkpoint_interval", 2, "--learning_rate", "1e-2"),
]
# Beyond the warm-up.
CONSTANT = ["--min_learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def runs(token_data, tmp_path_factory):
    """By schedule a run of four steps, and one of three times the length with the same
    warm-up."""
    root = tmp_path_factory.mktemp("extend")
    for name, schedule in (("constant", CONSTANT), ("cosine", [])):
        options = [*OPTIONS, *schedule, "--data", token_data]
        train_here([*options, "--steps", 4, "--output_dir", root / name])
        longer = ["--steps", STEPS, "--warmup_steps", 2]
        train_here([*options, *longer, "--output_dir", root / f"{name}-longer"])
    return root


@pytest.fixture
def options(runs, token_data, tmp_path):
    """Options of a copy of the short run with a cosine, in `tmp_path / "run"`."""
    shutil.copytree(runs / "cosine", tmp_path / "run")
    return [*OPTIONS, "--data", token_data, "--output_dir", tmp_path / "run"]


def tensors(folder):
    """Weights and moments of the end, by name."""
    found = {}
    for path in checkpoint_of(folder, STEPS).glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_extended_twice_it_is_the_longer_run_to_the_bit(runs, token_data, tmp_path):
    """With a constant learning rate; the default of the warm-up is that of the start."""
    folder, longer = tmp_path / "run", runs / "constant-longer"
    shutil.copytree(runs / "constant", folder)
    options = [*OPTIONS, *CONSTANT, "--data", token_data, "--output_dir", folder]
    for steps in (7, STEPS):
        output = train_here([*options, "--steps", steps, "--extend"])
        assert f"to {steps} steps" in output
    assert step_metrics(folder) == step_metrics(longer)
    assert sorted(step_metrics(folder)) == list(range(1, STEPS + 1))
    assert read_ledger(folder) == read_ledger(longer)
    epochs = {e for rows in read_ledger(folder).values() for e, _ in rows[0]}
    assert epochs == {0, 1}
    ours, theirs = tensors(folder), tensors(longer)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    extensions = json.loads((folder / "config.json").read_text())["extensions"]
    assert [(e["step"], e["steps_before"]) for e in extensions] == [(4, 4), (7, 7)]
    # The same command again has nothing left to do, with --extend or without.
    for more in (["--extend"], []):
        assert "is complete: 12 steps" in train_here(
            [*options, "--steps", STEPS, *more]
        )


def test_of_a_cosine_further_steps_have_the_rate_of_the_new_length(runs, options):
    output = train_here([*options, "--tokens", STEPS * 24 * 256, "--extend"])
    (line,) = (line for line in output.splitlines() if line.startswith("extended"))
    rates = step_metrics(options[-1], "learning_rate")
    before = step_metrics(runs / "cosine", "learning_rate")
    longer = step_metrics(runs / "cosine-longer", "learning_rate")
    assert rates == {**longer, **before} and before[4] < longer[4]
    assert f"{rates[4]:.3g} at step 4 and {rates[5]:.3g} at the next" in line
    final = json.loads((options[-1] / "COMPLETED").read_text())
    assert final["step"] == STEPS
    assert final["loss"] == step_metrics(options[-1])[STEPS]


def test_an_unfinished_run_is_extended(runs, options):
    folder = options[-1]
    (folder / "COMPLETED").unlink()
    shutil.rmtree(checkpoint_of(folder, 4))
    output = train_here([*options, "--steps", STEPS, "--extend"])
    assert "from 4 to 12 steps: from step 3 on" in output
    assert sorted(step_metrics(folder)) == list(range(1, STEPS + 1))
    longer = step_metrics(runs / "cosine-longer", "learning_rate")
    assert step_metrics(folder, "learning_rate")[4] == longer[4]


def test_a_run_of_before_there_were_other_schedules_goes_on(options):
    path = options[-1] / "config.json"
    record = json.loads(path.read_text())
    for part in ("training", "identity"):
        del record[part]["schedule"], record[part]["decay_fraction"]
    del record["schedule"]["kind"], record["schedule"]["decay_fraction"]
    path.write_text(json.dumps(record))
    assert "is complete: 4 steps" in train_here([*options, "--steps", 4])
    more = [*options, "--steps", STEPS, "--extend", "--dry_run"]
    assert "extended from 4 to 12 steps: from step 5 on" in train_here(more)
    branch = ["--resume", checkpoint_of(options[-1], 2), "--steps", STEPS, "--dry_run"]
    output = train_here([*options[:-1], path.parent.with_name("new"), *branch])
    assert "branching off at step 2" in output and "warmup_steps was 2, now 6" in output


@pytest.mark.slow
def test_it_goes_on_with_other_ranks_and_stages(runs, token_data, tmp_path):
    """Without dropout, whose masks are drawn a micro-batch at a time."""
    options = [*OPTIONS, *CONSTANT, "--data", token_data, "--dropout", 0]
    longer, folder = tmp_path / "longer", tmp_path / "run"
    train_here([*options, "--steps", 6, "--warmup_steps", 2, "--output_dir", longer])
    train_here([*options, "--steps", 4, "--output_dir", folder])
    more = ["--steps", 6, "--extend", "--deepspeed_config", "zero3"]
    train_in_turn([[*options, *more, "--output_dir", folder]])
    assert step_metrics(folder) == pytest.approx(step_metrics(longer), rel=1e-5)


def test_a_dry_run_says_what_becomes_of_it(options):
    before = (options[-1] / "config.json").read_bytes()
    output = train_here([*options, "--steps", STEPS, "--extend", "--dry_run"])
    assert "extended from 4 to 12 steps" in output
    assert (options[-1] / "config.json").read_bytes() == before
    assert RunFolder(options[-1]).completed() is not None


def test_what_cannot_be_extended_is_refused(options, tmp_path, capsys):
    def refusal(*more):
        capsys.readouterr()
        assert main(["train", *map(str, [*options, *more])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "3 steps are fewer than the 4 that it has" in refusal(
        "--steps", 3, "--extend"
    )
    line = refusal("--steps", STEPS)
    assert "steps was 4, now 12" in line and "--extend makes the run longer" in line
    longer = ["--steps", STEPS, "--extend"]
    line = refusal(*longer, "--seed", 1)
    assert "seed was 0, now 1: give" in line and "--extend makes" not in line
    assert "warmup_steps was 2, now 3" in refusal(*longer, "--warmup_steps", 3)
    checkpoint = checkpoint_of(options[-1], 4)
    assert "--extend continues the run" in refusal(*longer, "--resume", checkpoint)
    line = refusal(*longer, "--output_dir", tmp_path / "none")
    assert "holds none" in line and not (tmp_path / "none").exists()

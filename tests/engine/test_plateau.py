"""Schedules whose past does not depend on the length: exact extensions, and branches."""

import shutil

import pytest
from safetensors.torch import load_file

from ten_dist.cli import main
from ten_dist.run_folder import RunFolder, checkpoint_step
from tests.tools.launching import (
    SMALL_MODEL,
    checkpoint_of,
    step_metrics,
    train_here,
    train_in_turn,
)

SHORT, LONG = 8, 16
OPTIONS = [
    *SMALL_MODEL,
    *("--dropout", 0.1, "--precision", "fp32", "--num_workers", 0),
    *("--global_batch_size", 4, "--seq_len", 64, "--checkpoint_interval", 2),
    *("--learning_rate", "1e-2", "--warmup_steps", 2),
]
# The decays begin after steps 6 and 12.
WSD = ["--schedule", "wsd", "--decay_fraction", 0.25]
PLATEAU = 6


@pytest.fixture(scope="module")
def data(token_data):
    return [*OPTIONS, "--data", token_data]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A short run and a long one with a plateau, to their ends."""
    root = tmp_path_factory.mktemp("plateau")
    for name, steps in (("short", SHORT), ("long", LONG)):
        train_here([*data, *WSD, "--steps", steps, "--output_dir", root / name])
    return root


@pytest.fixture
def short(runs, tmp_path):
    """A copy of the short run."""
    return shutil.copytree(runs / "short", tmp_path / "short")


def stopped_at(folder, step):
    """The run as a kill after the checkpoint of a step had left it."""
    (folder / "COMPLETED").unlink()
    for checkpoint in RunFolder(folder).all_checkpoints():
        if checkpoint_step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def tensors(folder, step):
    """Weights and moments, by name."""
    found = {}
    for path in checkpoint_of(folder, step).glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_end(ours, theirs, step):
    ours, theirs = tensors(ours, step), tensors(theirs, step)
    assert ours.keys() == theirs.keys()
    return all(ours[name].equal(theirs[name]) for name in ours)


def refusal(capsys, options):
    capsys.readouterr()
    assert main(["train", *map(str, options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# The length is chosen late: on the plateau it is not yet an option of the run.
@pytest.mark.parametrize("more", [["--extend"], []])
def test_extended_on_the_plateau_it_is_the_longer_run(runs, data, short, more):
    stopped_at(short, PLATEAU)
    options = [*data, *WSD, "--steps", LONG, "--output_dir", short]
    output = train_here([*options, *more])
    assert (
        "extended from 8 to 16 steps: from step 7 on it is exactly a run of" in output
    )
    assert step_metrics(short) == step_metrics(runs / "long")
    assert same_end(short, runs / "long", LONG)
    assert RunFolder(short).read().extensions[0].step == PLATEAU


def test_two_decays_branch_off_from_one_checkpoint(runs, data, tmp_path):
    trunk = runs / "short"
    before = {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    checkpoint = checkpoint_of(trunk, PLATEAU)
    decays = {
        "longer": ["--steps", LONG, "--decay_fraction", 0.25, "--extend"],
        "steeper": ["--steps", 7, "--decay_fraction", 0.1],
        "gentler": ["--steps", 12, "--decay_fraction", 0.5],
    }
    whole = {"longer": runs / "long", "gentler": tmp_path / "whole"}
    schedule = [*data, "--schedule", "wsd"]
    train_here([*schedule, *decays["gentler"], "--output_dir", whole["gentler"]])
    for name, decay in decays.items():
        options = [*schedule, *decay, "--output_dir", tmp_path / name]
        output = train_here([*options, "--resume", checkpoint])
        (line,) = (x for x in output.splitlines() if x.startswith("branching off"))
        assert f"at step 6 of {trunk}, which stays as it is: exactly what" in line
        if name in whole:
            expected = step_metrics(whole[name])
            after = {s: loss for s, loss in expected.items() if s > PLATEAU}
            assert step_metrics(tmp_path / name) == after
            assert same_end(tmp_path / name, whole[name], max(after))
    # The same command again has nothing left to do.
    assert "is complete: 12 steps" in train_here([*options, "--resume", checkpoint])
    assert before == {p: p.read_bytes() for p in trunk.rglob("*") if p.is_file()}
    extensions = RunFolder(tmp_path / "longer").read().extensions
    assert [(e.step, e.steps_before) for e in extensions] == [(PLATEAU, SHORT)]
    assert RunFolder(tmp_path / "longer").read().attempts == 1


def test_ranks_agree_on_a_branch_and_on_its_end(runs, data, tmp_path):
    options = [*data, *WSD, "--steps", 7, "--output_dir", tmp_path / "run"]
    branch = [*options, "--resume", checkpoint_of(runs / "short", PLATEAU - 2)]
    output = train_in_turn([branch, branch], timeout=120)
    assert output.count("branching off at step 4") == 1
    assert "is complete: 7 steps" in output
    assert sorted(step_metrics(tmp_path / "run")) == [5, 6, 7]


def test_a_branch_tells_what_it_changes(runs, data, tmp_path):
    options = [*data, "--schedule", "wsd", "--weight_decay", 0.2, "--dry_run"]
    options += ["--steps", LONG, "--output_dir", tmp_path / "new"]
    checkpoint = checkpoint_of(runs / "short", SHORT)
    output = train_here([*options, "--resume", checkpoint])
    assert "weight_decay was 0.1, now 0.2; the learning rate is 0 at step 8" in output
    assert "and 0.01 at the next" in output


def test_an_extension_after_the_decay_began_is_told(data, short, capsys):
    options = [*data, *WSD, "--steps", LONG, "--output_dir", short]
    line = refusal(capsys, options)
    assert "steps was 8, now 16" in line and "--extend makes the run longer" in line
    output = train_here([*options, "--extend", "--dry_run"])
    (line,) = (line for line in output.splitlines() if line.startswith("extended"))
    assert "0 at step 8 and 0.01 at the next" in line
    checkpoint = checkpoint_of(short, PLATEAU)
    assert (
        f"the decay had begun: to extend the plateau instead, give --resume {checkpoint}"
        in line
    )
    line = refusal(capsys, [*options, "--extend", "--resume", checkpoint])
    assert "not from --resume" in line and "give another --output_dir" in line
    for step in (2, 4, PLATEAU):
        shutil.rmtree(checkpoint_of(short, step))
    output = train_here([*options, "--extend", "--dry_run"])
    assert "the decay had begun, and no checkpoint of the plateau is left" in output


def test_a_run_that_was_extended_late_is_not_said_to_be_exact(data, short):
    options = [*data, *WSD, "--output_dir", short]
    train_here([*options, "--steps", LONG, "--extend"])
    # On the plateau of the second length, with the decay of the first behind it.
    stopped_at(short, 10)
    output = train_here([*options, "--steps", 40, "--extend", "--dry_run"])
    assert "the decay had begun: to extend" in output and "step_00000006" in output


def test_what_cannot_branch_off_is_refused(runs, data, tmp_path, capsys):
    checkpoint = checkpoint_of(runs / "short", PLATEAU)
    options = [*data, *WSD, "--extend", "--output_dir", tmp_path / "new"]
    longer = [*options, "--steps", LONG]
    branch = ["--resume", checkpoint]
    line = refusal(capsys, [*options, *branch, "--steps", 7])
    assert "7 steps are fewer than the 8 that it has" in line
    line = refusal(capsys, [*longer, *branch, "--decay_fraction", 0.5])
    assert "decay_fraction was 0.25, now 0.5" in line
    moved = shutil.copytree(checkpoint, tmp_path / "moved" / "deep" / checkpoint.name)
    line = refusal(capsys, [*longer, "--resume", moved])
    assert "lies in the folder of none: leave --extend out" in line
    assert "--resume never does not" in refusal(capsys, [*longer, "--resume", "never"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_without_a_decay_every_extension_is_exact(data, tmp_path, schedule):
    options = [*data, "--schedule", schedule]
    folder, longer = tmp_path / "run", tmp_path / "longer"
    train_here([*options, "--steps", 4, "--output_dir", folder])
    train_here([*options, "--steps", 8, "--output_dir", longer])
    output = train_here([*options, "--steps", 8, "--output_dir", folder])
    assert "from 4 to 8 steps: from step 5 on it is exactly" in output
    assert step_metrics(folder) == step_metrics(longer)
    assert same_end(folder, longer, 8)
    # Nor does a length that is shorter than it was, and no shorter than what is done.
    stopped_at(folder, 6)
    output = train_here([*options, "--steps", 7, "--output_dir", folder])
    assert "shortened from 8 to 7 steps: from step 7 on it is exactly" in output
    stopped_at(folder, 6)
    output = train_here([*options, "--steps", 6, "--output_dir", folder])
    assert "shortened from 7 to 6 steps, all of which are done" in output
    assert RunFolder(folder).completed()["loss"] == step_metrics(longer)[6]

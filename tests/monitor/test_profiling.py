"""`--profile_steps`, and what is left where the memory of a GPU runs out."""

import gzip
import json

import pytest
import torch

from ten_dist.config.training import TrainingConfig
from ten_dist.engine.step import Stepper
from ten_dist.errors import ConfigurationError
from tests.tools.launching import SMALL_MODEL, step_metrics, train_here

OPTIONS = [
    *SMALL_MODEL,
    *("--precision", "fp32", "--global_batch_size", 4, "--seq_len", 32),
    *("--num_workers", 0, "--steps", 6, "--eval_rows", 4),
]


@pytest.fixture(scope="module")
def undisturbed(token_data, tmp_path_factory):
    """A run that is not profiled."""
    folder = tmp_path_factory.mktemp("profiling") / "run"
    train_here([*OPTIONS, "--data", token_data, "--output_dir", folder])
    return folder


def profiled(token_data, folder, steps, *more):
    arguments = [*OPTIONS, *more, "--data", token_data, "--output_dir", folder]
    return train_here([*arguments, "--profile_steps", steps])


def test_a_trace_and_a_table_of_what_the_steps_spent(undisturbed, token_data, tmp_path):
    folder = tmp_path / "run"
    # A validation between the steps is in the trace, and in no share.
    output = profiled(token_data, folder, "3:4", "--eval_interval", 3)
    assert step_metrics(folder) == step_metrics(undisturbed)
    names = ["rank0000_steps_3_4.json.gz", "rank0000_steps_3_4.md"]
    assert sorted(p.name for p in (folder / "profile").iterdir()) == names
    assert str(folder / "profile" / names[1]) in output
    with gzip.open(folder / "profile" / names[0]) as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name")).startswith("step ")}
    assert steps == {"step 3", "step 4"}
    table = (folder / "profile" / names[1]).read_text()
    assert table.startswith("# Rank 0, steps 3 to 4\n")
    rows = {
        cells[0].strip(): float(cells[2].strip(" %")) / 100
        for cells in (line.strip("|").split("|") for line in table.splitlines())
        if len(cells) == 3 and "%" in cells[2]
    }
    assert any(name.startswith("`aten::copy_`, copies") for name in rows)
    assert 0 < rows["matrix products"] < 1
    phases = ("waiting for data", "forward", "backward")
    update = "update of the weights, and gathering figures"
    assert 0.5 < sum(rows[name] for name in (*phases, update)) <= 1.01
    operators = [share for name, share in rows.items() if name.startswith("`")]
    assert operators == sorted(operators, reverse=True)
    assert 0 < sum(operators) <= 1.001


def test_resumed_in_the_middle_it_traces_the_rest(token_data, tmp_path, monkeypatch):
    """And a run that ends in the middle leaves what it has; a disk that is full ends none."""
    folder, step = tmp_path / "run", Stepper.__call__

    def interrupted(self, number, *others):
        if number == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, number, *others)

    def dump(path):
        with open(path, "wb") as file:
            file.write(b"blocks")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Stepper, "__call__", interrupted)
        profiled(token_data, folder, "2:5", "--checkpoint_interval", 3)
    profile = folder / "profile"
    assert (profile / "rank0000_memory.pickle").read_bytes() == b"blocks"
    profiled(token_data, folder, "2:5", "--checkpoint_interval", 3)
    tables = sorted(p.name for p in profile.glob("*.md"))
    assert tables == ["rank0000_steps_2_4.md", "rank0000_steps_4_5.md"]
    assert sorted(step_metrics(folder)) == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_written_is_one_line(undisturbed, token_data, tmp_path, capsys):
    folder = tmp_path / "run"
    profiled(token_data, folder, "1:1", "--steps", 2, "--checkpoint_interval", 2)
    capsys.readouterr()
    # A file where the folder would be fails as a full disk does.
    for path in (folder / "profile").iterdir():
        path.unlink()
    (folder / "profile").rmdir()
    (folder / "profile").write_text("")
    profiled(token_data, folder, "3:4", "--extend")
    error = capsys.readouterr().err
    assert error.count("--profile_steps gave no files, training goes on") == 1
    assert step_metrics(folder)[6]


@pytest.mark.parametrize("steps", ["3", "4:3", "0:2", "1:2:3", "a:b", "1:101"])
def test_a_range_that_is_none_is_refused(steps):
    with pytest.raises(ConfigurationError, match="--profile_steps"):
        TrainingConfig(dry_run=True, profile_steps=steps)


def test_a_range_beyond_the_run_is_refused(token_data, tmp_path, capsys):
    from ten_dist.cli import main

    arguments = [*OPTIONS, "--data", token_data, "--output_dir", tmp_path / "run"]
    arguments += ["--profile_steps", "6:7"]
    assert main(["train", *map(str, arguments)]) == 2
    assert "is beyond the run, which has 6 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

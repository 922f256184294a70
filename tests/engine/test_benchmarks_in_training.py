"""`--eval_tasks`: figures of lm-evaluation-harness on all ranks, and a run that is the same."""

import json

import pytest

from ten_dist.cli import main
from tests.tools.launching import (
    SMALL_MODEL,
    read_metrics,
    step_metrics,
    train_in_turn,
)
from tests.tools.task_files import write_tasks

pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
COMMON = [
    *(*SMALL_MODEL, "--hten_scales", "1,2,4", "--dropout", "0.1"),
    *("--seq_len", 32, "--global_batch_size", 8, "--steps", 6, "--precision", "fp32"),
    *("--num_workers", 0, "--learning_rate", "1e-2", "--eval_interval", 4),
]


@pytest.fixture(autouse=True)
def without_hub(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hub"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "files")


def options(tasks, names="choosing,reading"):
    return ["--eval_tasks", names, "--eval_tasks_path", tasks]


@pytest.mark.slow
def test_losses_are_the_same_to_the_bit_and_figures_those_of_one_process(
    token_data, tasks, tmp_path, capsys
):
    trainings = []
    for stage in ("zero2", "zero3"):
        for name, more in (("plain", []), ("asked", options(tasks))):
            folder = tmp_path / f"{stage}-{name}"
            more = [*more, "--eval_tasks_interval", 2] if more else []
            more += ["--deepspeed_config", stage, "--output_dir", folder]
            trainings.append([*COMMON, "--data", token_data, *more])
    train_in_turn(trainings, ranks=2)
    for stage in ("zero2", "zero3"):
        plain, asked = tmp_path / f"{stage}-plain", tmp_path / f"{stage}-asked"
        assert step_metrics(asked) == step_metrics(plain)
        assert step_metrics(asked, "val_loss") == step_metrics(plain, "val_loss")
        found = step_metrics(asked, "task/choosing/acc")
        assert sorted(found) == [2, 4, 6]
        capsys.readouterr()
        names = ["--tasks", "choosing,reading", "--include_path", str(tasks), "--json"]
        assert main(["evaluate", str(asked), *names]) == 0
        alone = json.loads(capsys.readouterr().out)["tasks"]
        last = [m for m in read_metrics(asked) if "task/reading/bits_per_byte" in m][-1]
        for name in ("choosing/acc", "choosing/acc_norm", "reading/bits_per_byte"):
            task, _, figure = name.partition("/")
            assert last[f"task/{name}"] == pytest.approx(alone[task][figure], abs=1e-5)
        assert not any("stderr" in name for name in last)


@pytest.mark.slow
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    token_data, tasks, tmp_path, capsys
):
    def refusal(*more):
        capsys.readouterr()
        folder = tmp_path / "run"
        arguments = [*COMMON, "--data", token_data, "--output_dir", folder, *more]
        assert main(["train", *map(str, arguments)]) == 2
        assert not folder.exists()
        return capsys.readouterr().err

    assert "--eval_tasks_limit has no effect" in refusal("--eval_tasks_limit", 3)
    assert "--eval_tasks chosing: there is no" in refusal(*options(tasks, "chosing"))
    assert "--eval_tasks_path" in refusal(*options(tmp_path / "none"))
    line = refusal(*options(tasks, "choosing,writing"))
    assert "--eval_tasks writing has the model write" in line
    own = write_tasks(tmp_path / "own")
    (own / "choosing.jsonl").write_text("{")
    assert "choosing cannot be loaded" in refusal(*options(own, "choosing"))

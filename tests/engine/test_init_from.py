"""`--init_from`: the weights of a run, of a checkpoint or of an exported model begin another."""

import shutil

import pytest

from data_prep.shard import main as prepare
from ten_dist.cli import main
from tests.conftest import write_corpus
from tests.tools.launching import (
    SMALL_MODEL,
    step_metrics,
    train,
    train_in_turn,
)

MODEL = [*SMALL_MODEL, "--hten_scales", "1,2", "--short_convolution", 3]
COMMON = [
    *("--seq_len", 32, "--precision", "fp32", "--num_workers", 0, "--eval_rows", 0),
    *("--learning_rate", "1e-2", "--eval_interval", 10),
]


@pytest.fixture(scope="module")
def other_data(token_data, tmp_path_factory):
    """Other texts with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    write_corpus(folder / "corpus", files=10, seed=7)
    arguments = ["--input", folder / "corpus", "--output", folder / "tokens"]
    arguments += ["--tokenizer", token_data / "tokenizer.json"]
    assert prepare([*map(str, arguments), "--val_fraction", "0.2"]) == 0
    return folder / "tokens"


@pytest.fixture(scope="module")
def source(token_data, tmp_path_factory):
    """A run that has learned something."""
    folder = tmp_path_factory.mktemp("source") / "run"
    options = ["--data", token_data, "--steps", 20, "--global_batch_size", 8]
    arguments = [*MODEL, *COMMON, *options, "--output_dir", folder]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


def continued(token_data, source, folder, *options):
    """The options of a run with the weights of another, on the same held-out rows."""
    return [
        *(*MODEL, *COMMON, "--data", token_data, "--init_from", source),
        *("--output_dir", folder, "--steps", 2, "--global_batch_size", 4, *options),
    ]


@pytest.mark.slow
def test_a_run_begins_where_another_ended(source, token_data, tmp_path):
    last = step_metrics(source, "val_loss")[20]
    checkpoint = source / "checkpoints" / "step_00000020"
    train_in_turn(
        [
            continued(token_data, source, tmp_path / "2"),
            continued(
                *(token_data, checkpoint, tmp_path / "3"),
                *("--deepspeed_config", "zero3", "--dropout", "0.1"),
            ),
        ],
        ranks=2,
    )
    for name in ("2", "3"):
        losses = step_metrics(tmp_path / name, "val_loss")
        assert losses[0] == pytest.approx(last, abs=1e-5)
        assert sorted(losses) == [0, 2]
        # The schedule begins anew.
        assert sorted(step_metrics(tmp_path / name)) == [1, 2]


def test_other_data_and_rows_are_learned_faster_than_from_nothing(
    source, other_data, tmp_path
):
    options = ["--data", other_data, "--steps", 10, "--global_batch_size", 6]
    options = [*MODEL, *COMMON, *options, "--seq_len", 48]
    for name, more in (("tuned", ["--init_from", source]), ("anew", [])):
        arguments = [*options, *more, "--output_dir", tmp_path / name]
        assert main(["train", *map(str, arguments)]) == 0
    tuned = step_metrics(tmp_path / "tuned", "val_loss")
    anew = step_metrics(tmp_path / "anew", "val_loss")
    assert tuned[10] < anew[10]
    # What is complete needs its source no more.
    gone = ["--init_from", tmp_path / "gone", "--output_dir", tmp_path / "tuned"]
    assert main(["train", *map(str, [*options, *gone])]) == 0


def test_an_exported_model_comes_back(source, token_data, tmp_path):
    pytest.importorskip("transformers")
    exported = tmp_path / "exported"
    assert main(["export", str(source), "--output", str(exported)]) == 0
    arguments = continued(token_data, exported, tmp_path / "run")
    assert main(["train", *map(str, arguments)]) == 0
    last = step_metrics(source, "val_loss")[20]
    losses = step_metrics(tmp_path / "run", "val_loss")
    assert losses[0] == pytest.approx(last, abs=1e-6)


def test_what_cannot_begin_a_run_is_refused(source, token_data, tmp_path, capsys):
    def refusal(origin, *options):
        capsys.readouterr()
        arguments = continued(token_data, origin, tmp_path / "run", *options)
        assert main(["train", *map(str, arguments)]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    line = refusal(source, "--dim", 48)
    assert "is of another model: dim is 32 there and 48 here" in line
    assert "input_norm is dynamic there" in refusal(source, "--input_norm", "none")
    assert "is neither the folder of a run" in refusal(tmp_path)
    line = refusal(source, "--resume", source / "checkpoints" / "step_00000020")
    assert "--init_from and --resume PATH" in line
    write_corpus(tmp_path / "corpus", files=4)
    bytes_too = ["--input", tmp_path / "corpus", "--output", tmp_path / "tokens"]
    assert prepare([*map(str, bytes_too), "--vocab_size", "300"]) == 0
    line = refusal(source, "--data", tmp_path / "tokens")
    assert "is of another tokenizer" in line


def test_a_damaged_source_is_named(source, token_data, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    for path in (tmp_path / "source" / "checkpoints").glob("step_*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    output = train(
        continued(token_data, tmp_path / "source", tmp_path / "run"), ranks=1, expect=2
    )
    assert "the checkpoint cannot be loaded" in output

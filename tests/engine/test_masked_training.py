"""`--document_masking`: a run keeps documents apart wherever its model is used."""

import dataclasses
import json
import shutil

import pytest
import torch

from data_prep.shard import main as prepare
from ten_dist.cli import main
from ten_dist.data import Manifest, TokenReader
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.conftest import write_corpus
from tests.tools.launching import SMALL_MODEL, read_metrics, step_metrics, train


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Byte tokens of documents much shorter than a row, held-out ones in val/."""
    folder = tmp_path_factory.mktemp("short")
    corpus = write_corpus(folder / "corpus", files=300, words=5)
    output = folder / "shards"
    arguments = ["--input", corpus, "--output", output, "--tokenizer", "bytes"]
    assert prepare([*map(str, arguments), "--val_fraction", "0.2"]) == 0
    return output


def options(data, folder, **changes):
    values = {
        "data": data,
        "output_dir": folder,
        "steps": 8,
        "seq_len": 96,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
        "eval_rows": 0,
        "precision": "fp32",
        "num_workers": 0,
        **changes,
    }
    return [
        *SMALL_MODEL,
        *(f"--{name}={value}" for name, value in values.items() if value is not None),
    ]


@pytest.fixture(scope="module")
def masked_run(short_documents, tmp_path_factory):
    """Folder of a run of a TEN that was trained with the option."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    assert main(["train", *options(short_documents, folder), "--document_masking"]) == 0
    return folder


def output_of(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def loss_of_documents_alone(network, tokens, seq_len, separator):
    """Mean loss over all rows, each document (or what a row has of it) by itself."""
    total = count = 0
    for first in range(0, len(tokens) - seq_len, seq_len):
        row = tokens[first : first + seq_len + 1]
        ends = (row[:-1] == separator).nonzero().flatten() + 1
        starts = sorted({0, *ends.tolist()} - {seq_len})
        for start, stop in zip(starts, [*starts[1:], seq_len]):
            part = row[None, start : stop + 1]
            losses = network.compute_loss(part[:, :-1], part[:, 1:])
            total += losses["ce_loss"].item() * (stop - start)
            count += stop - start
    return total / count


@torch.no_grad()
def test_a_run_is_validated_and_evaluated_by_documents(
    capsys, short_documents, masked_run
):
    config = json.loads((masked_run / "config.json").read_text())
    held_out = Manifest.load(short_documents / "val")
    separator = held_out.separator_id
    assert config["model"]["document_separator_id"] == separator == 256
    assert config["training"]["document_masking"] is True
    figures = json.loads(output_of(capsys, "evaluate", masked_run, "--json"))
    assert figures["val_loss"] == pytest.approx(
        step_metrics(masked_run, "val_loss")[8], abs=1e-4
    )
    network = TrainedModel.load(RunFolder(masked_run)).network
    tokens = TokenReader(held_out).read(0, held_out.tokens)
    tokens = torch.from_numpy(tokens.astype("int64"))
    assert (tokens == separator).sum() > 30
    alone = loss_of_documents_alone(network, tokens, 96, separator)
    assert figures["val_loss"] == pytest.approx(alone, abs=1e-4)


def test_the_option_changes_what_is_trained(short_documents, tmp_path):
    losses = {}
    for flag in ("--document_masking", "--no-document_masking"):
        run = tmp_path / flag
        changes = {"steps": 2, "learning_rate": 1e-9}
        arguments = options(short_documents, run, **changes)
        assert main(["train", *arguments, flag]) == 0
        losses[flag] = step_metrics(run)
    first, second = losses.values()
    assert first.keys() == second.keys() == {1, 2}
    assert all(first[step] != second[step] for step in first)


def test_the_run_says_so_and_generates(capsys, masked_run, short_documents, tmp_path):
    arguments = options(short_documents, tmp_path / "run", steps=1)
    output = output_of(capsys, "train", *arguments, "--document_masking")
    assert "documents: kept apart" in output and "id 256" in output
    text = output_of(
        capsys, "generate", masked_run, "--prompt", "the", "--max_new_tokens", 9
    )
    assert text.startswith("the")


def test_the_option_is_a_part_of_what_a_run_is(
    capsys, masked_run, short_documents, tmp_path
):
    arguments = options(short_documents, masked_run)
    error = error_of(capsys, "train", *arguments)
    assert "document_masking was True, now None" in error
    output = output_of(capsys, "train", *arguments, "--document_masking")
    assert "is complete" in output
    # A new run from a checkpoint of this one.
    newest = RunFolder(masked_run).newest_checkpoint()
    arguments = options(short_documents, tmp_path / "run", resume=newest)
    error = error_of(capsys, "train", *arguments)
    assert "document_masking was True, now None" in error


def test_a_run_from_before_the_option_continues(capsys, short_documents, tmp_path):
    run = tmp_path / "run"
    arguments = options(short_documents, run, steps=1)
    assert main(["train", *arguments]) == 0
    config = json.loads((run / "config.json").read_text())
    del config["identity"]["document_masking"]
    (run / "config.json").write_text(json.dumps(config))
    assert "is complete" in output_of(capsys, "train", *arguments)


def test_without_data_there_is_no_separator(capsys):
    arguments = ["--config", "pico", "--dry_run", "--document_masking"]
    error = error_of(capsys, "train", *arguments)
    assert "--document_masking needs the separator of the data" in error


def test_the_separator_is_no_option_of_its_own(capsys, short_documents, tmp_path):
    arguments = options(short_documents, tmp_path / "run", document_separator_id=3)
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments])
    assert exit_.value.code == 2
    assert "document_separator_id" in capsys.readouterr().err


def test_held_out_data_of_another_separator_is_refused(
    capsys, masked_run, short_documents, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(short_documents / "val", other)
    dataclasses.replace(Manifest.load(other), separator_id=10).write()
    arguments = options(short_documents, tmp_path / "run", val_data=other, steps=1)
    error = error_of(capsys, "train", *arguments, "--document_masking")
    assert "--document_masking cannot have" in error and "--separator" in error
    assert not (tmp_path / "run").exists()
    error = error_of(capsys, "evaluate", masked_run, "--data", other)
    assert "keeps documents apart by token 256" in error
    # Where documents run on, the separator is a token like others.
    assert main(["train", *arguments]) == 0


def test_a_mixture_is_masked(short_documents, token_data, tmp_path):
    data = f"short={short_documents}:1,long={token_data}:1"
    run = tmp_path / "run"
    arguments = options(data, run, steps=2)
    assert main(["train", *arguments, "--document_masking", "--use_hten"]) == 0
    model = json.loads((run / "config.json").read_text())["model"]
    assert model["document_separator_id"] == 256
    assert {m["step"] for m in read_metrics(run) if "ce_loss/short" in m} == {1, 2}


def test_a_transformer_is_masked(capsys, short_documents, tmp_path):
    run = tmp_path / "run"
    arguments = options(short_documents, run, steps=2)
    position = arguments.index("--num_eigenstates")
    del arguments[position : position + 2]
    assert main(["train", *arguments, "--document_masking", "--mixer=attention"]) == 0
    figures = json.loads(output_of(capsys, "evaluate", run, "--json"))
    assert figures["val_loss"] == pytest.approx(
        step_metrics(run, "val_loss")[2], abs=1e-4
    )


@pytest.mark.slow
def test_compiled_sharded_training_follows_plain_training(short_documents, tmp_path):
    """HTEN with a short convolution at ZeRO stage 3, compiled, with recomputation."""
    flags = ["--document_masking", "--short_convolution", 3, "--hten_scales", "1,2"]
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    changes = {"micro_batch_size": 1, "steps": 4}
    arguments = options(short_documents, plain, **changes)
    assert main(["train", *arguments, *map(str, flags)]) == 0
    arguments = options(short_documents, sharded, **changes)
    sharding = ["--deepspeed_config", "zero3", "--gradient_checkpointing", "block"]
    train([*arguments, *flags, *sharding, "--compile"], ranks=2, timeout=600)
    for name in ("loss", "gradient_norm", "val_loss"):
        expected = step_metrics(plain, name)
        assert step_metrics(sharded, name) == pytest.approx(expected, abs=2e-4), name


def test_bfloat16_stays_near_float32(short_documents, masked_run, tmp_path):
    arguments = options(short_documents, tmp_path / "run", precision="bf16")
    assert main(["train", *arguments, "--document_masking"]) == 0
    expected = step_metrics(masked_run)
    assert step_metrics(tmp_path / "run") == pytest.approx(expected, abs=0.03)

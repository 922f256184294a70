"""`--init_from`: the weights of a run, of a checkpoint or of an exported model begin another."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.shard import main as prepare
from ten_dist.checkpoint import CheckpointReader, read_record
from ten_dist.cli import main
from ten_dist.data import Manifest
from ten_dist.data.tokenizer import set_tokenizer
from ten_dist.export.model_card import model_card
from ten_dist.run_folder import RunFolder
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
    (tmp_path / "link").symlink_to(source)
    begin = ["--init_from", tmp_path / "link"]
    for name, more in (("tuned", begin), ("anew", [])):
        arguments = [*options, *more, "--output_dir", tmp_path / name]
        assert main(["train", *map(str, arguments)]) == 0
    tuned = step_metrics(tmp_path / "tuned", "val_loss")
    anew = step_metrics(tmp_path / "anew", "val_loss")
    assert tuned[10] < anew[10]
    # What is complete needs its source no more.
    (tmp_path / "link").unlink()
    arguments = [*options, *begin, "--output_dir", tmp_path / "tuned"]
    assert main(["train", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """The source as it is exported, in several files, among what an earlier save left."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ten_dist.export.huggingface.LARGEST_FILE", 40_000)
        assert main(["export", str(source), "--output", str(folder)]) == 0
    for path in sorted(folder.glob("model-*.safetensors")):
        wrong = {n: torch.zeros_like(value) for n, value in load_file(path).items()}
        save_file(wrong, folder / f"model-old-{path.name}")
    return folder


def test_an_exported_model_comes_back(exported, source, token_data, tmp_path):
    arguments = continued(token_data, exported, tmp_path / "run")
    assert main(["train", *map(str, arguments)]) == 0
    last = step_metrics(source, "val_loss")[20]
    losses = step_metrics(tmp_path / "run", "val_loss")
    assert losses[0] == pytest.approx(last, abs=1e-6)


def test_a_tokenizer_that_transformers_saved_again_is_the_same(
    exported, token_data, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    exported = shutil.copytree(exported, tmp_path / "exported")
    before = (exported / "tokenizer.json").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokenizer(["a", "state"], padding=True)
    tokenizer.save_pretrained(exported)
    assert (exported / "tokenizer.json").read_text() != before
    arguments = continued(token_data, exported, tmp_path / "run", "--dry_run")
    assert main(["train", *map(str, arguments)]) == 0
    # Without any, that cannot be known.
    (exported / "tokenizer.json").unlink()
    capsys.readouterr()
    assert main(["train", *map(str, arguments)]) == 0
    assert "has no tokenizer beside it to compare" in capsys.readouterr().err


def test_a_checkpoint_by_itself_is_taken_with_a_word(
    source, token_data, other_data, tmp_path, capsys
):
    checkpoint = tmp_path / "moved"
    shutil.copytree(source / "checkpoints" / "step_00000020", checkpoint)

    def said(data, *more):
        capsys.readouterr()
        arguments = continued(data, checkpoint, tmp_path / "run", "--dry_run", *more)
        status = main(["train", *map(str, arguments)])
        return status, capsys.readouterr().err

    status, words = said(other_data)
    assert status == 0 and "has no tokenizer beside it to compare" in words
    # The same data are of the same tokenizer.
    assert "tokenizer" not in said(token_data)[1]
    status, words = said(other_data, "--init_tokenizer_mismatch", "resize")
    assert status == 2 and "has no tokenizer beside it" in words


def test_where_a_run_began_is_recorded_and_held_to(
    source, token_data, tmp_path, capsys
):
    folder = tmp_path / "run"
    arguments = [*map(str, continued(token_data, source, folder))]
    assert main(["train", *arguments]) == 0
    origin = RunFolder(folder).read().origin
    assert (origin.path, origin.step) == (str(source), 20)
    assert len(origin.digest) == 64
    assert "began with the weights of | run, step 20" in card_of(folder)

    def refusal(*given):
        capsys.readouterr()
        assert main(["train", *map(str, given)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    checkpoint = source / "checkpoints" / "step_00000020"
    line = refusal(*arguments, "--init_from", checkpoint)
    assert f"began with the weights of {source}: leave out --init_from" in line
    plain = arguments.copy()
    at = plain.index("--init_from")
    del plain[at : at + 2]
    assert main(["train", *plain]) == 0
    # Before its first checkpoint it has nothing else to begin with.
    shutil.rmtree(folder / "checkpoints")
    (folder / "COMPLETED").unlink()
    assert f"began with the weights of {source}: give that" in refusal(*plain)
    plain[plain.index("--output_dir") + 1] = str(tmp_path / "anew")
    assert main(["train", *plain]) == 0
    again = [*plain, "--init_from", source]
    assert "holds a run that began anew: leave out" in refusal(*again)


def card_of(folder):
    record = RunFolder(folder).read()
    checkpoint = RunFolder(folder).usable_checkpoint()
    return model_card(record, read_record(checkpoint).state, "name")


@pytest.fixture(scope="module")
def bpe_data(tmp_path_factory):
    """Byte-level BPE of 300 tokens, which has all bytes."""
    folder = tmp_path_factory.mktemp("bpe")
    write_corpus(folder / "corpus", files=20, seed=3)
    arguments = ["--input", folder / "corpus", "--output", folder / "tokens"]
    arguments += ["--vocab_size", "300", "--val_fraction", "0.2"]
    assert prepare([*map(str, arguments)]) == 0
    return folder / "tokens"


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_rows_of_equal_tokens_are_kept(
    source, token_data, bpe_data, tmp_path, capfd, stage
):
    """From bytes to BPE and back; `embedding` is that of a run's first checkpoint, whose
    learning rate is too small to change anything."""
    still = ["--init_tokenizer_mismatch", "resize", "--learning_rate", "1e-30"]
    still += [
        "--muon_learning_rate",
        "1e-30",
        "--steps",
        1,
        "--deepspeed_config",
        stage,
    ]

    def resized(origin, data, name):
        arguments = continued(data, origin, tmp_path / name, *still)
        assert main(["train", *map(str, arguments)]) == 0
        return capfd.readouterr().out

    def embedding(folder):
        with CheckpointReader(RunFolder(folder).usable_checkpoint()) as reader:
            return reader.tensor("weight", "embedding.weight")

    def tokens(data):
        return set_tokenizer(Manifest.load(data)).vocabulary

    line = "257 of 300 tokens keep their embedding, 43 begin as in a new model"
    assert line in resized(source, bpe_data, "bpe")
    there, here = embedding(source), embedding(tmp_path / "bpe")
    as_bytes, as_bpe = tokens(token_data), tokens(bpe_data)
    kept = sorted(as_bytes.keys() & as_bpe.keys())
    assert len(kept) == 257
    theirs, ours = [as_bytes[t] for t in kept], [as_bpe[t] for t in kept]
    assert theirs != ours and here[ours].equal(there[theirs])
    new = here[[i for token, i in as_bpe.items() if token not in as_bytes]]
    assert len(new) == 43 and 0.015 < float(new.std()) < 0.025
    assert RunFolder(tmp_path / "bpe").read().origin.embedding_rows == 257
    line = "257 of 257 tokens keep their embedding, 0 begin"
    assert line in resized(tmp_path / "bpe", token_data, "bytes")
    assert embedding(tmp_path / "bytes").equal(there)
    # Everything else is as it was: text of bytes has the loss that it had.
    losses = step_metrics(tmp_path / "bytes", "val_loss")
    last = step_metrics(source, "val_loss")[20]
    assert losses[0] == pytest.approx(last, abs=1e-5)


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
    assert "is of another tokenizer" in line and "mismatch resize" in line
    mismatch = ["--init_tokenizer_mismatch", "resize"]
    assert "dim is 32 there" in refusal(source, *mismatch, "--dim", 48)


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

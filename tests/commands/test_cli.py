"""Using a run: ten-dist evaluate and ten-dist generate."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ten_dist.cli import main
from ten_dist.config.model import PAPER
from ten_dist.data import Manifest, TokenReader, token_counts
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.conftest import write_corpus
from tests.tools.launching import ROOT, SMALL_MODEL, read_metrics, step_metrics


@pytest.fixture(scope="module")
def run_folder(token_data, tmp_path_factory):
    """A short HTEN run that has learned something."""
    folder = tmp_path_factory.mktemp("use") / "run"
    arguments = [
        *SMALL_MODEL,
        *("--use_hten", "--data", token_data, "--output_dir", folder),
        *("--steps", 30, "--seq_len", 64, "--global_batch_size", 16),
        *("--optimizer", "adamw", "--learning_rate", "1e-2"),
        *("--precision", "fp32", "--num_workers", 0),
        *("--eval_interval", 15, "--eval_rows", 0, "--checkpoint_interval", 15),
    ]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


def command_output(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def command_error(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_mistyped_option_is_told_the_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--lerning_rate=1", "--steps", "3"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--lerning_rate=1 (do you mean --learning_rate?): see `ten-dist" in error


def test_a_mistyped_command_is_told_the_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["genrate", "RUN"])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("there is no command 'genrate' (do you mean generate?)")


def test_a_checkpoint_is_chosen(capsys, run_folder):
    losses = {}
    for name in (
        None,
        "15",
        "30",
        "best",
        run_folder / "checkpoints" / "step_00000015",
    ):
        chosen = [] if name is None else ["--checkpoint", name]
        figures = command_output(capsys, "evaluate", run_folder, "--json", *chosen)
        losses[str(name)] = json.loads(figures)["val_loss"]
        assert command_output(capsys, "generate", run_folder, "--seed", "1", *chosen)
    validated = step_metrics(run_folder, "val_loss")
    assert losses["15"] == pytest.approx(validated[15], rel=1e-5)
    assert losses["30"] == pytest.approx(validated[30], rel=1e-5)
    assert losses["None"] == losses["best"] == losses["30"] != losses["15"]
    assert losses[str(name)] == losses["15"]
    for name in ("7", "nowhere"):
        line = command_error(capsys, "generate", run_folder, "--checkpoint", name)
        assert (
            f"--checkpoint {name} is not there: the run has those of the steps" in line
        )


@pytest.mark.parametrize("command", ["evaluate", "generate", "export"])
def test_a_checkpoint_of_another_run_is_refused(capsys, run_folder, tmp_path, command):
    """Of the same shape, but its tokens may mean other words."""
    other = tmp_path / "step_00000015"
    shutil.copytree(run_folder / "checkpoints" / other.name, other)
    record = json.loads((other / "checkpoint.json").read_text())
    record["state_identity"]["data"] = "other"
    del record["crc32"]
    (other / "checkpoint.json").write_text(json.dumps(record))
    output = ["--output", tmp_path / "new"] if command == "export" else []
    line = command_error(capsys, command, run_folder, "--checkpoint", other, *output)
    assert f"--checkpoint {other} is of another run: data is other there" in line


def test_evaluation_is_that_of_every_held_out_token(capsys, run_folder, token_data):
    output = command_output(
        capsys, "evaluate", run_folder, "--json", "--unigram_baseline"
    )
    figures = json.loads(output)
    manifest = Manifest.load(token_data / "val")
    tokens = TokenReader(manifest).read(0, manifest.tokens).astype(np.int64)
    rows = (manifest.tokens - 1) // 64
    ids = torch.from_numpy(tokens[: rows * 64 + 1])
    model = TrainedModel.load(RunFolder(run_folder))
    with torch.no_grad():
        losses = [
            model.network.compute_loss(
                ids[None, r * 64 : r * 64 + 64], ids[None, r * 64 + 1 : r * 64 + 65]
            )["ce_loss"].item()
            for r in range(rows)
        ]
    mean = sum(losses) / rows
    assert figures["val_tokens"] == rows * 64
    assert figures["val_loss"] == pytest.approx(mean, abs=1e-4)
    assert figures["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    bytes_per_token = manifest.text_bytes / manifest.tokens
    bits = mean / math.log(2) / bytes_per_token
    assert figures["val_bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    # The same figure as the validation of the last training step.
    last = step_metrics(run_folder, "val_loss")[30]
    assert figures["val_loss"] == pytest.approx(last, abs=1e-4)
    # The unigram model, from counts: add-one smoothing over the training data.
    counts = token_counts(Manifest.load(token_data)) + 1.0
    log_p = np.log(counts / counts.sum())
    unigram = -log_p[ids[1:].numpy()].mean()
    assert figures["unigram_loss"] == pytest.approx(unigram, abs=1e-6)
    assert figures["val_loss"] < figures["unigram_loss"] - 0.3


def test_evaluation_in_words(capsys, run_folder):
    output = command_output(capsys, "evaluate", run_folder, "--max_rows", "3")
    assert "192 tokens" in output
    assert "nats a token, perplexity" in output and "bits per byte" in output


def test_generation_continues_the_prompt_and_repeats(capsys, run_folder):
    arguments = ["generate", run_folder, "--prompt", "the state", "--seed", 3]
    arguments += ["--max_new_tokens", 20]
    output = command_output(capsys, *arguments)
    assert output.startswith("the state") and len(output) > len("the state\n")
    assert command_output(capsys, *arguments) == output
    assert command_output(capsys, "generate", run_folder, "--max_new_tokens", 5)


def test_wrong_uses_are_refused(capsys, run_folder, token_data, tmp_path):
    error = command_error(capsys, "evaluate", tmp_path)
    assert "is not the folder of a run" in error
    assert "--temperature" in command_error(
        capsys, "generate", run_folder, "--temperature", "-1"
    )
    error = command_error(capsys, "generate", run_folder, "--max_new_tokens", "0")
    assert "--max_new_tokens must be 1 or more" in error
    for value in ("1000000", "0"):
        error = command_error(capsys, "evaluate", run_folder, "--seq_len", value)
        assert "--seq_len" in error
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "checkpoints")
    error = command_error(capsys, "generate", copy)
    assert "no complete checkpoint yet" in error


def test_data_of_another_tokenizer_is_refused(capsys, run_folder, tmp_path):
    from data_prep.shard import main as shard

    write_corpus(tmp_path / "corpus")
    arguments = ["--input", tmp_path / "corpus", "--output", tmp_path / "data"]
    assert shard([str(a) for a in [*arguments, "--vocab_size", 300]]) == 0
    error = command_error(capsys, "evaluate", run_folder, "--data", tmp_path / "data")
    assert "another tokenizer" in error


def test_damaged_weights_are_refused(capsys, run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    checkpoint = RunFolder(copy).usable_checkpoint()
    weights = checkpoint / "weights-00000-of-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    error = command_error(capsys, "generate", copy)
    assert f"{weights} does not have the checksum" in error


def test_every_option_has_help(capsys):
    for command in ("train", "evaluate", "generate"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        options = [line for line in text.splitlines() if line.startswith("  --")]
        assert len(options) >= 5
    assert "--ledger" in text or command != "train"


def test_models_need_no_deepspeed(tmp_path):
    """Built, run and saved with torch alone; deepspeed must not even be imported."""
    script = (
        "import sys, torch; sys.modules['deepspeed'] = None\n"
        "from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork\n"
        "import ten_dist.commands.evaluate, ten_dist.commands.generate, ten_dist.commands.train, ten_dist.cli\n"
        "model = TemporalEigenstateNetwork(TemporalEigenstateConfig(vocab_size=9))\n"
        "print(model(torch.zeros(1, 3, dtype=torch.int64)).shape)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "[1, 3, 9]" in result.stdout


def test_z_loss_is_reported(token_data, tmp_path):
    arguments = [*SMALL_MODEL, "--z_loss_weight", "1e-3", "--data", token_data]
    arguments += ["--output_dir", tmp_path / "run", "--steps", 2, "--seq_len", 32]
    assert main(["train", *map(str, arguments), "--num_workers", "0"]) == 0
    for metrics in read_metrics(tmp_path / "run"):
        if "loss" in metrics:
            parts = metrics["ce_loss"] + metrics["weighted_energy_loss"]
            assert metrics["loss"] == pytest.approx(parts + metrics["z_loss"], rel=1e-5)
            assert metrics["z_loss"] > 0


def test_metrics_have_every_figure_of_a_step(run_folder):
    steps = [m for m in read_metrics(run_folder) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 31))
    for metrics in steps:
        parts = metrics["ce_loss"] + 0.01 * metrics["energy_loss"]
        assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
        assert metrics["tokens"] == metrics["step"] * 16 * 64
        speed = 16 * 64 / metrics["step_seconds"]
        assert metrics["tokens_per_second"] == pytest.approx(speed)
        assert 0 <= metrics["data_seconds"] <= metrics["step_seconds"]
        assert metrics["memory_bytes"] > 1e7
        assert metrics["gradient_norm"] > 0
    rates = [m["learning_rate"] for m in steps]
    assert max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-3)
    assert rates[0] < rates[5] and rates[15] > rates[25]


def test_tensorboard_has_the_scalars_of_the_metrics(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    for tag, name in {
        "train/loss": "loss",
        "train/ce_loss": "ce_loss",
        "train/energy_raw": "energy_loss",
        "train/energy_weighted": "weighted_energy_loss",
        "train/learning_rate": "learning_rate",
        "train/gradient_norm": "gradient_norm",
        "speed/tokens_per_second": "tokens_per_second",
        "speed/step_seconds": "step_seconds",
        "speed/data_seconds": "data_seconds",
        "speed/memory_bytes": "memory_bytes",
        "validation/loss": "val_loss",
        "validation/perplexity": "val_perplexity",
    }.items():
        written = {e.step: e.value for e in events.Scalars(tag)}
        assert written == pytest.approx(step_metrics(run_folder, name), rel=1e-5), tag


def test_paper_is_one_option(token_data, tmp_path):
    arguments = [
        *SMALL_MODEL,
        *("--paper", "--data", token_data, "--output_dir", tmp_path / "run"),
        *("--steps", 1, "--seq_len", 32, "--global_batch_size", 4, "--num_workers", 0),
    ]
    assert main(["train", *map(str, arguments)]) == 0
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert {name: model[name] for name in PAPER} == {
        **PAPER,
        "selection_range": [0.1, 0.1],
    }
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not any(name.endswith("selection") for name in weights)
    alpha = weights["blocks.0.mixer.alpha_base"]
    assert -3 <= alpha.min() and alpha.max() <= 0

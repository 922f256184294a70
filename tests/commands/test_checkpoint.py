"""ten-dist checkpoint list, verify and convert."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ten_dist.cli import main
from tests.tools.launching import SMALL_MODEL


@pytest.fixture(scope="module")
def run_folder(token_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    arguments = [
        *SMALL_MODEL,
        *("--data", token_data, "--output_dir", folder, "--num_workers", 0),
        *("--steps", 3, "--seq_len", 32, "--global_batch_size", 4),
        *("--checkpoint_interval", 1, "--eval_interval", 2, "--precision", "fp32"),
    ]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


@pytest.fixture
def damaged(run_folder, tmp_path):
    """A copy whose newest checkpoint has one wrong bit, and the one before is cut."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    newest = folder / "checkpoints" / "step_00000003"
    weights = newest / "weights-00000-of-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    moments = newest.with_name("step_00000002") / "moments-00000-of-00001.safetensors"
    moments.write_bytes(moments.read_bytes()[:1000])
    return folder


def command(capsys, status, *arguments):
    """Output and errors of `ten-dist checkpoint`."""
    capsys.readouterr()
    assert main(["checkpoint", *map(str, arguments)]) == status
    return capsys.readouterr()


def test_list(capsys, run_folder, damaged):
    lines = command(capsys, 0, "list", run_folder).out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2", "3"]
    first, second = lines[1].split(), lines[2].split()
    # Validated at step 2, so that step 1 has nothing to show.
    assert first[2] == "-" and float(second[2]) == pytest.approx(5.5, abs=0.5)
    listed = command(capsys, 0, "list", damaged).out
    assert "2  damaged: " in listed and "has 1000 bytes instead of" in listed


def test_verify(capsys, run_folder, damaged):
    out = command(capsys, 0, "verify", run_folder).out
    assert out.count("is whole") == 3
    result = command(capsys, 2, "verify", damaged)
    assert result.out.count("is whole") == 1
    assert "weights-00000-of-00001.safetensors does not have the checksum" in result.err
    assert "moments-00000-of-00001.safetensors has 1000 bytes" in result.err
    assert "2 damaged" in result.err
    one = damaged / "checkpoints" / "step_00000001"
    assert "is whole" in command(capsys, 0, "verify", one).out


def test_convert(capsys, run_folder, damaged, tmp_path):
    half = tmp_path / "half.safetensors"
    command(capsys, 0, "convert", run_folder, "--output", half, "--dtype", "bf16")
    halves, weights = load_file(half), load_file(run_folder / "model.safetensors")
    assert halves.keys() == weights.keys()
    assert all(torch.equal(halves[name], weights[name].bfloat16()) for name in weights)
    newest = damaged / "checkpoints" / "step_00000003"
    refused = command(capsys, 2, "convert", newest, "--output", tmp_path / "none")
    assert "does not have the checksum" in refused.err
    assert not (tmp_path / "none").exists()
    nowhere = tmp_path / "no" / "folder"
    refused = command(capsys, 2, "convert", run_folder, "--output", nowhere)
    assert f"--output {nowhere} cannot be written" in refused.err


@pytest.mark.parametrize("action", [["verify"], ["convert", "--output", "none"]])
def test_what_is_no_checkpoint(capsys, tmp_path, action):
    error = command(capsys, 2, *action, tmp_path / "nowhere").err
    assert "nowhere is neither a checkpoint nor the folder of a run" in error

"""--dry_run: everything is checked, something is run, nothing is written."""

import re
from pathlib import Path

import pytest

from ten_dist.cli import main
from tests.tools.launching import SMALL_MODEL, train


def dry_run(capsys, *arguments):
    capsys.readouterr()
    assert main(["train", "--dry_run", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_small_model_makes_a_real_step(capsys, tmp_path, token_data):
    output = dry_run(
        capsys,
        *SMALL_MODEL,
        *("--data", token_data, "--output_dir", tmp_path / "run", "--seq_len", 64),
        *("--dry_samples", 3, "--global_batch_size", 8, "--steps", 5),
    )
    assert "a training step of 3 samples of 64 tokens" in output
    loss = float(re.search(r"cross-entropy ([\d.]+)", output)[1])
    assert 5.3 < loss < 5.8  # near ln 257
    assert "8 rows x 64 tokens = 512 tokens" in output
    assert "run: 5 steps x 512 = 2,560 tokens" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("usable", "depth", "says"),
    [
        (1.0, "forward", "of initial weights"),
        (0.0, "shapes", "shapes of forward and backward agree"),
    ],
)
def test_depth_follows_the_memory(capsys, monkeypatch, usable, depth, says):
    import ten_dist.engine.dry_run as module

    need = module.estimate_memory

    def only_forward_fits(*arguments):
        sizes = need(*arguments)
        monkeypatch.setattr(
            module, "_free_memory", lambda ranks: sizes["forward"] / 0.8 * usable
        )
        return sizes

    monkeypatch.setattr(module, "estimate_memory", only_forward_fits)
    output = dry_run(capsys, *SMALL_MODEL, "--vocab_size", 300, "--seq_len", 64)
    assert f"dry run: {depth} of 2 samples" in output and says in output


def shared_memory():
    """What DeepSpeed keeps in shared memory on this machine."""
    return set(Path("/dev/shm").glob("deepspeed*"))


@pytest.mark.slow
def test_two_ranks_share_the_samples_and_leave_no_memory_behind(tmp_path, token_data):
    before = shared_memory()
    output = train(
        [
            *SMALL_MODEL,
            *("--data", token_data, "--dry_run", "--dry_samples", 3),
            *("--deepspeed_config", "zero3", "--seq_len", 64),
        ],
        # It sets LOCAL_SIZE, which has DeepSpeed make buffers in shared memory.
        deepspeed=True,
    )
    assert "a training step of 4 samples" in output
    assert "nothing was written" in output
    assert shared_memory() <= before

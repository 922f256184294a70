"""A checkpoint is copied while the next step runs, and holds what was there before it."""

import time

import pytest

from ten_dist.cli import main
from ten_dist.engine.checkpointing.host_copy import HostCopy
from tests.tools.elastic_matrix import largest_difference
from tests.tools.launching import SMALL_MODEL, checkpoint_of, train_here

OPTIONS = [
    *SMALL_MODEL,
    *("--steps", 4, "--global_batch_size", 2, "--seq_len", 32, "--warmup_steps", 1),
    *("--checkpoint_interval", 2, "--keep_checkpoints", 5, "--precision", "fp32"),
    *("--num_workers", 0, "--data_verification", "size"),
]


@pytest.fixture
def slow_copy(monkeypatch):
    """Copies take longer than a step."""
    copy = HostCopy._copy

    def copy_late(self):
        time.sleep(1)
        copy(self)

    monkeypatch.setattr(HostCopy, "_copy", copy_late)


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_slow_copy_is_of_its_step(stage, token_data, tmp_path, request):
    options = [*OPTIONS, "--data", token_data, "--deepspeed_config", stage]
    train_here([*options, "--output_dir", tmp_path / "plain"])
    request.getfixturevalue("slow_copy")
    train_here([*options, "--output_dir", tmp_path / "slow"])
    for step in (2, 4):
        plain, slow = (checkpoint_of(tmp_path / n, step) for n in ("plain", "slow"))
        assert largest_difference(plain, slow) == 0


def test_a_copy_that_fails_ends_the_run(token_data, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("no host memory")

    monkeypatch.setattr(HostCopy, "_copy", fail)
    options = [*OPTIONS, "--data", token_data, "--output_dir", tmp_path]
    assert main(["train", *map(str, options)]) == 1
    assert "no host memory" in capsys.readouterr().err

"""`--compile` trains as without it, on one process and sharded on two."""

import json

import pytest

from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.tools.launching import SMALL_MODEL, step_metrics, train, train_here

OPTIONS = [
    *SMALL_MODEL,
    *("--steps", 4, "--global_batch_size", 4, "--micro_batch_size", 1),
    *("--seq_len", 48, "--warmup_steps", 1, "--learning_rate", "3e-3"),
    *("--eval_rows", 2, "--precision", "fp32", "--num_workers", 0),
]


@pytest.fixture(scope="module")
def eager_run(token_data, tmp_path_factory):
    """Folder of the same training without `--compile`."""
    folder = tmp_path_factory.mktemp("eager") / "run"
    train_here([*OPTIONS, "--data", token_data, "--output_dir", folder])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (0, ["--deepspeed_config", "zero0"]),
        (2, ["--deepspeed_config", "zero3", "--gradient_checkpointing", "block"]),
    ],
)
def test_compiled_training_follows_eager_training(
    ranks, flags, eager_run, token_data, tmp_path
):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--data", token_data, "--output_dir", folder]
    train([*options, *flags, "--compile"], ranks=ranks, timeout=600)
    for name in ("loss", "gradient_norm", "val_loss"):
        expected = step_metrics(eager_run, name)
        assert len(expected) == (1 if name == "val_loss" else 4)
        assert step_metrics(folder, name) == pytest.approx(expected, abs=1e-4), name
    trained, expected = (
        TrainedModel.load(RunFolder(run)).network for run in (folder, eager_run)
    )
    assert trained.state_dict().keys() == expected.state_dict().keys()
    assert json.loads((folder / "config.json").read_text())["training"]["compile"]


@pytest.mark.slow
def test_a_dry_run_compiles(token_data):
    options = [*OPTIONS, "--data", token_data, "--dry_run", "--dry_samples", 1]
    output = train_here([*options, "--compile"])
    assert "a training step of 1 samples" in output

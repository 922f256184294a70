"""Looking at what is learned while training: on TensorBoard, and without a trace in losses."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tools.launching import (
    SMALL_MODEL,
    read_metrics,
    step_metrics,
    train_here,
    train_in_turn,
)

ENERGIES = [f"energy/layer{layer}/scale{scale}" for layer in (1, 2) for scale in (1, 4)]


def training(data, folder, *more):
    options = [*SMALL_MODEL, "--hten_scales", "1,4", "--dropout", 0.1, "--steps", 5]
    options += ["--seq_len", 32, "--global_batch_size", 8, "--precision", "fp32"]
    return [*options, "--num_workers", 0, "--data", data, "--output_dir", folder, *more]


@pytest.fixture(scope="module")
def looked(token_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked") / "run"
    train_here(training(token_data, folder, "--analysis_interval", 2))
    return folder


def test_pictures_histograms_and_energies_are_shown(looked):
    # 0 is all of them.
    sizes = {"histograms": 0, "images": 0}
    events = EventAccumulator(str(looked / "tensorboard"), sizes).Reload()
    for picture in ("analysis/eigenvalues", "analysis/memory"):
        shown = events.Images(picture)
        assert [image.step for image in shown] == [2, 4]
        assert all(i.encoded_image_string.startswith(b"\x89PNG") for i in shown)
    histograms = events.Histograms("log10_memory_tokens/layer 2, scale 4")
    # Twelve eigenstates a place; memory of scale 4 is no shorter than its step.
    assert [h.histogram_value.num for h in histograms] == [12, 12]
    assert histograms[0].histogram_value.min >= 0.6
    for name in ENERGIES:
        found = {m["step"]: m[name] for m in read_metrics(looked) if name in m}
        assert list(found) == [2, 4] and min(found.values()) > 0
        shown = events.Scalars(f"analysis/{name}")
        assert [s.value for s in shown] == pytest.approx([*found.values()])


def test_one_rank_has_nothing_to_communicate(looked):
    assert not any("communication_share" in m for m in read_metrics(looked))


def test_losses_are_the_same_to_the_bit(token_data, looked, tmp_path):
    train_here(training(token_data, tmp_path / "run", "--analysis_interval", 0))
    assert step_metrics(tmp_path / "run") == step_metrics(looked)


@pytest.mark.slow
def test_on_sharded_ranks_the_same_is_seen(token_data, looked, tmp_path):
    stage = ("--deepspeed_config", "zero3", "--micro_batch_size", 4)
    train_in_turn(
        [
            training(token_data, tmp_path / "on", *stage, "--analysis_interval", 2),
            training(token_data, tmp_path / "off", *stage, "--analysis_interval", 0),
        ]
    )
    assert step_metrics(tmp_path / "on") == step_metrics(tmp_path / "off")
    shares = {
        m["step"]: m["communication_share"]
        for m in read_metrics(tmp_path / "on")
        if "communication_share" in m
    }
    # Stage 3 gathers every layer.
    assert list(shares) == [2, 4] and all(0.01 < s < 1 for s in shares.values())
    for name in ENERGIES:
        # Dropout is drawn by rank, so that weights are alike and not equal.
        found = [m[name] for m in read_metrics(tmp_path / "on") if name in m]
        here = [m[name] for m in read_metrics(looked) if name in m]
        assert found == pytest.approx(here, rel=0.2)
    events = EventAccumulator(str(tmp_path / "on" / "tensorboard")).Reload()
    histogram = events.Histograms("log10_memory_tokens/layer 1, scale 1")[0]
    assert histogram.histogram_value.num == 12

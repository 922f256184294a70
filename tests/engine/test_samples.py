"""Texts that a model writes while it trains: on TensorBoard, and without a trace in losses."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ten_dist.cli import main
from tests.tools.launching import (
    SMALL_MODEL,
    step_metrics,
    train_here,
    train_in_turn,
)

PROMPTS = ["the first", "", "an *odd* one\nof two lines"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': p})}\n" for p in PROMPTS))
    return file


def training(data, folder, *more):
    options = [*SMALL_MODEL, "--hten_scales", "1,4", "--dropout", 0.1, "--steps", 5]
    options += ["--seq_len", 32, "--global_batch_size", 8, "--precision", "fp32"]
    options += ["--analysis_interval", 2]
    return [*options, "--num_workers", 0, "--data", data, "--output_dir", folder, *more]


def shown(folder):
    """Texts by number of the prompt and step."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = [t for t in events.Tags()["tensors"] if t.startswith("samples/")]
    return {
        (tag, event.step): event.tensor_proto.string_val[0].decode()
        for tag in tags
        for event in events.Tensors(tag)
    }


def test_prompts_are_continued_at_the_interval_and_at_the_end(
    token_data, prompts, tmp_path
):
    train_here(training(token_data, tmp_path / "on", "--sample_prompts", prompts))
    train_here(training(token_data, tmp_path / "off"))
    # The same to the bit, with dropout that the texts must not have drawn from.
    assert step_metrics(tmp_path / "on") == step_metrics(tmp_path / "off")
    texts = shown(tmp_path / "on")
    assert sorted(texts) == [(f"samples/{n}", s) for n in (1, 2, 3) for s in (2, 4, 5)]
    text = texts["samples/3", 5]
    assert "    an *odd* one\n    of two lines" in text
    assert len(text.split("\n\ncontinuation\n\n")[1]) > 10
    assert not shown(tmp_path / "off")


@pytest.mark.slow
def test_on_sharded_ranks_the_same_is_written(token_data, prompts, tmp_path):
    stage = ("--deepspeed_config", "zero3", "--micro_batch_size", 4)
    asked = ("--sample_prompts", prompts)
    on, off = tmp_path / "on", tmp_path / "off"
    train_in_turn(
        [
            training(token_data, on, *stage, *asked),
            training(token_data, off, *stage),
        ]
    )
    assert step_metrics(on) == step_metrics(off)
    assert len(shown(on)) == 9


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "has no prompts"),
        ('{"text": "a"}', "line 1"),
        ('{"prompt": "a"}\n' * 17, "leave 16 at most"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(
    token_data, tmp_path, capsys, content, said
):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    options = training(token_data, tmp_path / "run", "--sample_prompts", file)
    assert main(["train", *map(str, options)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Training on conversations: the loss counts what the mask says, on any number of ranks."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data_prep.ranks import Ranks
from data_prep.shard import main as prepare
from ten_dist.cli import main
from ten_dist.data import BatchShape, Manifest, parse_mixture, training_batches
from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.mixture import Mixture
from ten_dist.data.tokenizer import set_tokenizer
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.tools.launching import (
    SMALL_MODEL,
    from_step_four,
    step_metrics,
    train_here,
    train_in_turn,
)

SEQ_LEN, ROWS, STEPS = 64, 8, 12
WORDS = [
    "the",
    "state",
    "of",
    "a",
    "wave",
    "decays",
    "turns",
    "and",
    "is",
    "read",
    "again",
]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Shards of byte tokens with a mask; some rows have few targets that count, or none."""
    folder = tmp_path_factory.mktemp("conversations")
    draw = random.Random(0)

    def said(words):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, words)))

    with open(folder / "chat.jsonl", "w") as file:
        for _ in range(120):
            messages = [
                {"role": role, "content": said(words)}
                for _ in range(draw.randint(1, 3))
                for role, words in (("user", 40), ("assistant", draw.choice([2, 30])))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    arguments = ["--input", folder / "chat.jsonl", "--output", folder / "shards"]
    arguments += ["--tokenizer", "bytes", "--chat", "--val_fraction", "0.1"]
    arguments += ["--shard_megabytes", "0.01"]
    assert prepare([str(argument) for argument in arguments], Ranks()) == 0
    return folder / "shards"


def options(data, folder, **changes):
    values = {
        "data": data,
        "output_dir": folder,
        "steps": STEPS,
        "seq_len": SEQ_LEN,
        "global_batch_size": ROWS,
        "micro_batch_size": 2,
        "warmup_steps": 3,
        "checkpoint_interval": 4,
        "precision": "fp32",
        "num_workers": 0,
        **changes,
    }
    given = [f"--{name}={value}" for name, value in values.items()]
    return [*SMALL_MODEL, "--use_hten", "--hten_scales=1,2", *given]


@pytest.fixture(scope="module")
def one(conversations, tmp_path_factory):
    """Folder of a run on one rank that was never interrupted."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train_here([*options(conversations, folder), "--document_masking"])
    return folder


@pytest.fixture(scope="module")
def two(conversations, tmp_path_factory):
    """Folder of the same runs on two ranks, by their stage."""
    folder = tmp_path_factory.mktemp("two")
    train_in_turn(
        [
            *options(conversations, folder / stage, deepspeed_config=stage),
            "--document_masking",
        ]
        for stage in ("zero0", "zero2", "zero3")
    )
    return folder


@torch.no_grad()
def by_hand(network, data, step, seed=1234):
    """Cross-entropy of a step from the logits, over all targets that count; how many."""
    shape = BatchShape(SEQ_LEN, ROWS)
    (batch,) = training_batches(
        data, shape, seed=seed, first_step=step, last_step=step + 1, num_workers=0
    )
    losses = torch.log_softmax(network(batch.inputs).double(), dim=-1)
    total = count = 0
    for row in range(ROWS):
        for at in range(SEQ_LEN):
            if batch.stored[row, at + 1] >> 31:
                total -= losses[row, at, batch.tokens[row, at + 1]].item()
                count += 1
    return total / count, count


def test_the_loss_is_that_of_the_logits_at_what_the_mask_counts(conversations, one):
    run = one
    seed = json.loads((run / "config.json").read_text())["training"]["seed"]
    data = Manifest.load(conversations)
    for step in (4, 8):
        network = TrainedModel.load(RunFolder(run), str(step)).network
        expected, counted = by_hand(network, data, step, seed)
        assert step_metrics(run, "ce_loss")[step + 1] == pytest.approx(
            expected, abs=1e-5
        )
        assert step_metrics(run, "counted_tokens")[step + 1] == counted
        assert 0 < counted < ROWS * SEQ_LEN


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_two_ranks_count_as_one_does(one, two, stage):
    for name in ("loss", "ce_loss", "gradient_norm", "counted_tokens", "val_loss"):
        expected = step_metrics(one, name)
        found = step_metrics(two / stage, name)
        assert found == pytest.approx(expected, rel=1e-5), name


@pytest.mark.slow
def test_one_rank_goes_on_with_what_two_began(conversations, one, two, tmp_path):
    folder = from_step_four(two / "zero3", tmp_path / "run")
    changes = {"micro_batch_size": 1, "deepspeed_config": "zero1"}
    train_here([*options(conversations, folder, **changes), "--document_masking"])
    for name in ("loss", "counted_tokens"):
        expected = step_metrics(one, name)
        assert step_metrics(folder, name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_ranks_go_on_with_what_one_began(conversations, one, tmp_path):
    folder = from_step_four(one, tmp_path / "run")
    changes = {"micro_batch_size": 4, "deepspeed_config": "zero2"}
    given = [*options(conversations, folder, **changes), "--document_masking"]
    train_in_turn([given])
    for name in ("loss", "counted_tokens"):
        expected = step_metrics(one, name)
        assert step_metrics(folder, name) == pytest.approx(expected, rel=1e-5)


def test_in_a_mixture_all_of_what_has_no_mask_counts(
    conversations, token_data, tmp_path
):
    option = f"chat={conversations}:1,text={token_data}:1"
    run = tmp_path / "run"
    train_here(options(option, run, steps=4, checkpoint_interval=3))
    sources = parse_mixture(option)
    mixture = Mixture(
        tuple(source.name for source in sources),
        tuple(Manifest.load(source.address) for source in sources),
        tuple(source.share for source in sources),
    )
    seed = json.loads((run / "config.json").read_text())["training"]["seed"]
    network = TrainedModel.load(RunFolder(run), "3").network
    expected, counted = by_hand(network, mixture, 3, seed)
    assert step_metrics(run, "counted_tokens")[4] == counted > ROWS // 2 * SEQ_LEN
    assert step_metrics(run, "ce_loss")[4] == pytest.approx(expected, abs=1e-5)
    of_source = [step_metrics(run, f"ce_loss/{name}")[4] for name in ("chat", "text")]
    text = ROWS // 2 * SEQ_LEN
    shares = np.array([counted - text, text]) / counted
    assert np.dot(shares, of_source) == pytest.approx(expected, abs=1e-4)


def test_a_step_of_which_nothing_counts_is_no_fault(conversations, tmp_path):
    """Nothing but energy is learned from it."""
    silent = tmp_path / "chat.jsonl"
    with open(silent, "w") as file:
        messages = [
            {"role": "user", "content": "wave " * 2000},
            {"role": "assistant", "content": "x"},
        ]
        file.write(json.dumps({"messages": messages}) + "\n")
    arguments = ["--input", silent, "--output", tmp_path / "data", "--chat"]
    arguments += ["--tokenizer", "bytes"]
    assert prepare([str(argument) for argument in arguments], Ranks()) == 0
    run = tmp_path / "run"
    train_here(options(tmp_path / "data", run, steps=6, global_batch_size=2))
    counted, losses = (
        step_metrics(run, name) for name in ("counted_tokens", "ce_loss")
    )
    silent_steps = [step for step, count in counted.items() if count == 0]
    assert silent_steps and all(losses[step] == 0 for step in silent_steps)
    assert set(step_metrics(run, "skipped_steps").values()) == {0}


def test_float16_scales_the_loss_and_counts_the_same(conversations, one, tmp_path):
    run = tmp_path / "run"
    train_here([*options(conversations, run, precision="fp16"), "--document_masking"])
    expected = step_metrics(one, "ce_loss")
    assert step_metrics(run, "ce_loss") == pytest.approx(expected, abs=0.05)
    counted = step_metrics(one, "counted_tokens")
    assert step_metrics(run, "counted_tokens") == counted


def test_an_export_speaks_by_the_template(conversations, one, tmp_path):
    exported = tmp_path / "exported"
    assert main(["export", str(one), "--output", str(exported)]) == 0
    messages = [{"role": "user", "content": "is a wave read again"}]
    manifest = Manifest.load(conversations)
    ids, _ = ChatTemplate.default().encode(messages, set_tokenizer(manifest), True)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert ids.tolist() == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert [tokenizer.decode([end]) for end in ends] == ["<|endoftext|>", "\x03"]


def test_a_run_and_its_evaluation_keep_template_and_mask(conversations, one, capsys):
    template = (conversations / "chat_template.jinja").read_bytes()
    assert (one / "chat_template.jinja").read_bytes() == template
    capsys.readouterr()
    assert main(["evaluate", str(one), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["val_loss"] == pytest.approx(
        step_metrics(one, "val_loss")[STEPS], abs=1e-5
    )
    held_out = Manifest.load(conversations / "val")
    assert 0 < figures["val_tokens"] <= held_out.counted_tokens

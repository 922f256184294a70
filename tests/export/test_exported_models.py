"""Exported models in transformers: what users of it do with any model works with ours."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ten_dist import TemporalEigenstateNetwork
from ten_dist.cli import main
from ten_dist.export.huggingface import exported_name
from ten_dist.generation import Sampling, generate
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.tools.launching import SMALL_MODEL, read_metrics

transformers = pytest.importorskip("transformers")
ALL_CACHE_NAMES = transformers.generation.utils.ALL_CACHE_NAMES

COMMON = [
    *("--seq_len", 64, "--global_batch_size", 8, "--steps", 4, "--precision", "fp32"),
    *("--num_workers", 0, "--learning_rate", "1e-2", "--checkpoint_interval", 2),
]
VARIANTS = {
    "ten": SMALL_MODEL,
    "hten": [*SMALL_MODEL, "--hten_scales", "1,2,4"],
    "everything": [
        *SMALL_MODEL,
        *("--hten_scales", "1,2,4", "--short_convolution", 4, "--gate", "state"),
        *("--document_masking", "--input_norm", "static"),
        "--no-learnable_selection_range",
    ],
    "levels": [
        *(*SMALL_MODEL, "--levels", "4,8", "--short_convolution", 3),
        *("--document_masking", "--optimizer", "muon", "--muon_learning_rate", "0.1"),
    ],
    "matrix": [*SMALL_MODEL, "--state_dim", 4],
    "matrix_among_others": [
        *SMALL_MODEL,
        *("--state_dim", 4, "--matrix_layers", 1, "--matrix_eigenstates", 12),
        *("--hten_scales", "1,2,4", "--document_masking", "--short_convolution", 3),
    ],
    "attention": [
        *("--config", "pico", "--dim", 32, "--n_layers", 2, "--num_heads", 2),
        *("--mixer", "attention", "--document_masking"),
    ],
}


@pytest.fixture(scope="module")
def runs(token_data, tmp_path_factory):
    """A run of each variant, and what was exported of it."""
    root = tmp_path_factory.mktemp("export")
    for name, options in VARIANTS.items():
        arguments = [*options, *COMMON, "--data", token_data]
        arguments += ["--output_dir", root / name]
        assert main(["train", *map(str, arguments)]) == 0
        output = str(root / f"{name}-exported")
        assert main(["export", str(root / name), "--output", output]) == 0
    return root


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(runs, name, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        runs / f"{name}-exported", trust_remote_code=True, **options
    )
    return model.eval()


def load_tokenizer(runs, name):
    return transformers.AutoTokenizer.from_pretrained(runs / f"{name}-exported")


PROMPTS = ["the wave", "a state of every later token decays and", "of"]


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_is_that_of_the_run(runs, name):
    model, tokenizer = load(runs, name), load_tokenizer(runs, name)
    ours = TrainedModel.load(RunFolder(runs / name)).network
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    (added,) = generate(ours, [prompt], 200, Sampling(temperature=0))
    wanted = torch.tensor([prompt + added])
    for use_cache in (True, False):
        steps = 200 if use_cache else 20
        got = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
        )
        assert torch.equal(got, wanted[:, : got.shape[1]])


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_of_unequal_length_do_not_see_their_padding(runs, name):
    model, tokenizer = load(runs, name), load_tokenizer(runs, name)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    logits = model(**batch).logits
    for row, prompt in enumerate(PROMPTS):
        single = tokenizer(prompt, return_tensors="pt")
        length = single["input_ids"].shape[1]
        alone = model.generate(**single, **options)[0, length:]
        assert torch.equal(together[row], alone)
        expected = model(**single).logits[0]
        assert torch.allclose(logits[row, -length:], expected, atol=1e-5)


def test_a_text_is_continued_with_what_the_cache_has_of_it(runs):
    model, tokenizer = load(runs, "hten"), load_tokenizer(runs, "hten")
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {"do_sample": False, "eos_token_id": None}
    whole = model.generate(**inputs, max_new_tokens=12, **options)
    half = model.generate(
        **inputs, max_new_tokens=6, return_dict_in_generate=True, **options
    )
    # What generate calls it depends on the version of transformers.
    named = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
    options[named] = half[named]
    rest = model.generate(half.sequences, max_new_tokens=6, **options)
    assert torch.equal(rest, whole)
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, use_cache=False)
    assert torch.equal(beams, model.generate(**inputs, max_new_tokens=4, num_beams=2))
    next_id = half.sequences[:, -1:]
    ours = model(next_id, cache=half[named]).logits
    assert torch.equal(model(next_id, past_key_values=half[named]).logits, ours)


def test_the_cache_does_not_grow(runs):
    model = load(runs, "everything")
    sizes = set()
    cache = None
    for steps in (1, 7, 200):
        ids = torch.randint(257, (2, steps))
        cache = model(ids, cache=cache, use_cache=True).cache
        sizes.add(sum(t.numel() for layer in cache.layers for t in layer))
    assert len(sizes) == 1 and cache.get_seq_length() == 208


@pytest.mark.parametrize(
    "name", ["ten", "everything", "levels", "matrix", "matrix_among_others"]
)
def test_pieces_give_what_the_whole_gives(runs, name):
    model = load(runs, name)
    ids = torch.randint(257, (2, 37), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = ids[1, 20] = 256
    whole, pieces, cache = model(ids).logits, [], None
    for piece in ids.split([1, 3, 17, 16], dim=1):
        output = model(piece, cache=cache, use_cache=True)
        pieces.append(output.logits)
        cache = output.cache
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_may_be_longer_than_a_piece(runs, name):
    """Rows that begin in the first, second and third piece, or right at its start."""
    model = load(runs, name)
    ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(2))
    lengths = [20, 13, 9, 3]
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : 24 - length] = 0
        # As a tokenizer pads.
        ids[row, : 24 - length] = 256
    pieces, cache, end = [], None, 0
    for piece in ids.split([7, 4, 4, 5, 4], dim=1):
        end += piece.shape[1]
        output = model(piece, attention_mask=mask[:, :end], cache=cache, use_cache=True)
        pieces.append(output.logits)
        cache = output.cache
    logits = torch.cat(pieces, dim=1)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:]).logits[0]
        assert torch.allclose(logits[row, -length:], alone, atol=1e-5), row


@pytest.mark.parametrize(
    "name", ["hten", "everything", "levels", "matrix_among_others"]
)
def test_more_text_may_be_padded_too(runs, name):
    """As turns of unequal length in conversations that go on."""
    model = load(runs, name)
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(3))
    ids[2, 5] = 256
    mask = torch.ones_like(ids)
    mask[1, 6:10], mask[2, 6:] = 0, 0
    ids[mask == 0] = 256
    first = model(ids[:, :6], use_cache=True)
    both = model(ids[:, 6:], attention_mask=mask, cache=first.cache, use_cache=True)
    last = torch.randint(256, (3, 2))
    after = model(last, cache=both.cache).logits
    for row in range(3):
        text = torch.cat([ids[row][mask[row] == 1], last[row]]).unsqueeze(0)
        assert torch.allclose(after[row], model(text).logits[0, -2:], atol=1e-5), row
    if name != "hten":
        return
    attention = load(runs, "attention")
    cache = attention(ids[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match="no padding behind tokens"):
        attention(ids[:, 6:], attention_mask=mask, cache=cache)


def test_hidden_states_stand_where_their_tokens_do(runs):
    model, tokenizer = load(runs, "hten"), load_tokenizer(runs, "hten")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    for row, prompt in enumerate(PROMPTS):
        single = tokenizer(prompt, return_tensors="pt")
        length = single["input_ids"].shape[1]
        alone = model(**single, output_hidden_states=True).hidden_states
        for together, own in zip(states, alone, strict=True):
            assert together.shape == (3, batch["input_ids"].shape[1], 32)
            assert torch.allclose(together[row, -length:], own[0], atol=1e-5)


@pytest.mark.parametrize("name", ["everything", "attention", "matrix_among_others"])
def test_embeddings_behind_a_separator_are_of_another_document(runs, name):
    model = load(runs, name)
    ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(4))
    ids[0, 7] = 256
    cache = model(ids[:, :8], use_cache=True).cache
    embeddings = model.get_input_embeddings()(ids[:, 8:])
    logits = model(inputs_embeds=embeddings, cache=cache).logits
    assert torch.allclose(logits, model(ids).logits[:, 8:], atol=1e-5)


def test_labels_give_the_loss(runs, token_data):
    model = load(runs, "hten")
    ids = torch.randint(257, (3, 20))
    labels = ids.clone()
    labels[:, :7] = -100
    logits = model(ids).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert torch.allclose(model(ids, labels=labels).loss, wanted)


def test_the_pipeline_and_beams_write(runs):
    model, tokenizer = load(runs, "hten"), load_tokenizer(runs, "hten")
    pipeline = transformers.pipeline(
        "text-generation", model=model, tokenizer=tokenizer
    )
    (answer,) = pipeline("the state", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("the state")
    inputs = tokenizer("the state", return_tensors="pt")
    beams = model.generate(
        **inputs, max_new_tokens=8, num_beams=3, num_return_sequences=3, do_sample=False
    )
    assert beams.shape[0] == 3
    # The best beam is no less likely than the greedy continuation.
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    def likelihood(ids):
        logits = model(ids).logits.log_softmax(dim=-1)[:, :-1]
        return float(logits.gather(2, ids[:, 1:, None]).sum())

    assert likelihood(beams[:1]) >= likelihood(greedy) - 1e-4


@pytest.mark.parametrize("name", ["everything", "attention", "matrix_among_others"])
def test_it_is_saved_and_loaded_again(runs, name, tmp_path):
    model = load(runs, name)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    ).eval()
    ids = torch.arange(40).unsqueeze(0)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["hten", "everything", "matrix_among_others"])
def test_new_models_are_made_from_a_configuration(runs, name):
    config = transformers.AutoConfig.from_pretrained(
        runs / f"{name}-exported", trust_remote_code=True
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, trust_remote_code=True
    )
    ours = TemporalEigenstateNetwork(RunFolder(runs / name).read().model)
    for buffer, values in ours.named_buffers():
        found = model.get_buffer(f"model.{buffer}")
        assert torch.allclose(found, values, atol=1e-5), buffer
    for matrix, rows in ours.hidden_matrices().items():
        parts = (
            [part.std().item() for part in parameter.detach().split(rows)]
            for parameter in (
                ours.get_parameter(matrix),
                model.get_parameter(exported_name(matrix)),
            )
        )
        for wanted, found in zip(*parts, strict=True):
            assert found == pytest.approx(wanted, rel=0.15), matrix
    loss = model(
        torch.arange(60).unsqueeze(0), labels=torch.arange(60).unsqueeze(0)
    ).loss
    assert abs(float(loss) - torch.log(torch.tensor(257.0))) < 0.5


def test_the_trainer_and_adapters_lower_the_loss(runs, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    text = torch.tensor(list(b"of the wave and " * 4)).tolist()
    data = [{"input_ids": text, "labels": text}] * 8

    def losses(model, **options):
        trainer = transformers.Trainer(
            model=model,
            train_dataset=data,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / "trainer"),
                max_steps=6,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                **options,
            ),
        )
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    full = losses(load(runs, "hten"), gradient_checkpointing=True)
    assert full[-1] < full[0]
    adapted = peft.get_peft_model(
        load(runs, "hten"),
        peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj", "up", "down"]),
    )
    tuned = losses(adapted)
    assert tuned[-1] < tuned[0] and tuned[0] == pytest.approx(full[0], rel=1e-4)


@pytest.mark.parametrize("name", ["everything", "matrix"])
def test_recomputing_gives_the_same_gradient(runs, name):
    ids = torch.arange(50).unsqueeze(0)
    gradients = []
    for recompute in (False, True):
        model = load(runs, name).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_other_checkpoints_and_types(runs, tmp_path):
    output = str(tmp_path / "half")
    options = ["--checkpoint", "2", "--dtype", "bf16", "--output", output]
    assert main(["export", str(runs / "hten"), *options]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        output, trust_remote_code=True
    )
    assert model.dtype == torch.bfloat16
    mixer = model.model.blocks[0].mixer.scales[0].ten
    assert mixer.omega_base.dtype == torch.float32
    assert model(torch.arange(9).unsqueeze(0)).logits.isfinite().all()
    card = (tmp_path / "half" / "README.md").read_text()
    assert "| steps | 2 of 4 |" in card
    loss = next(m["val_loss"] for m in read_metrics(runs / "hten") if "val_loss" in m)
    newest = (runs / "hten-exported" / "README.md").read_text()
    assert f"| held-out loss | {loss:.4f} |" in newest
    best = str(tmp_path / "best")
    arguments = ["--checkpoint", "best", "--output", best]
    assert main(["export", str(runs / "hten"), *arguments]) == 0


def test_the_card_says_what_eigenstates_carry(runs):
    cards = [(runs / f"{n}-exported" / "README.md").read_text() for n in VARIANTS]
    found = [
        line for card in cards for line in card.splitlines() if "of a layer" in line
    ]
    assert found == [
        *["| of a layer | 24 eigenstates |"] * 4,
        "| of a layer | 24 eigenstates of 4 numbers |",
        "| of a layer | 24 eigenstates (12 of 4 numbers in a matrix layer) |",
    ]


def test_large_models_are_cut_into_files(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("ten_dist.export.huggingface.LARGEST_FILE", 40_000)
    assert main(["export", str(runs / "hten"), "--output", str(tmp_path / "cut")]) == 0
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (tmp_path / "cut" / "model.safetensors").exists()


def test_it_needs_transformers_alone(runs, tmp_path):
    """In a process that cannot import ten_dist."""
    program = (
        "import sys, torch, transformers\n"
        "sys.modules['ten_dist'] = sys.modules['deepspeed'] = None\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        "model = load(sys.argv[1], trust_remote_code=True)\n"
        "print(model(torch.arange(9)[None]).logits.shape)\n"
    )
    output = subprocess.run(
        [sys.executable, "-I", "-c", program, str(runs / "everything-exported")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "torch.Size([1, 9, 257])\n"


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_exported_is_one_line(runs, tmp_path, capsys):
    output = ["--output", tmp_path / "new"]
    assert "is not the folder of a run" in refusal(capsys, tmp_path, *output)
    line = refusal(capsys, runs / "ten", *output, "--checkpoint", "3")
    assert "--checkpoint 3 is not there: the run has those of the steps 2, 4" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    line = refusal(capsys, runs / "ten", "--output", tmp_path / "full")
    assert "is there already" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_a_full_disk_is_one_line_and_leaves_nothing(runs, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a process may write ends as a disk does, but for the word.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        status = main(["export", str(runs / "ten"), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_an_error(runs, tmp_path, monkeypatch, capsys):
    from ten_dist.export import huggingface

    right = huggingface.exported_config
    monkeypatch.setattr(
        huggingface,
        "exported_config",
        lambda model: {**right(model), "selection_range": [4.0, 0.1]},
    )
    output = tmp_path / "of" / "parents" / "wrong"
    assert main(["export", str(runs / "everything"), "--output", str(output)]) == 1
    assert "differs from the run's by" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_rounding_of_many_layers_is_no_difference(token_data, tmp_path, capsys):
    deep = [*SMALL_MODEL, "--hten_scales", "1,2,4", "--n_layers", 24]
    arguments = [*deep, *COMMON, "--data", token_data, "--output_dir", tmp_path / "run"]
    arguments += ["--steps", 1, "--global_batch_size", 1]
    assert main(["train", *map(str, arguments)]) == 0
    output = str(tmp_path / "exported")
    assert main(["export", str(tmp_path / "run"), "--output", output]) == 0
    difference = capsys.readouterr().out.split("logits within ")[1].split()[0]
    assert float(difference) < 1e-10


def test_it_is_loaded_without_ten_dist_by_the_transformers_of_the_user(
    runs, tmp_path, monkeypatch, capsys
):
    """Also where that lies on a relative PYTHONPATH."""

    def error():
        output = str(tmp_path / "new")
        assert main(["export", str(runs / "ten"), "--output", output]) == 1
        return capsys.readouterr().err

    from ten_dist.export import huggingface

    with monkeypatch.context() as patch:

        def copy(source, destination):
            text = source.read_text() + "\nimport ten_dist.model\n"
            destination.write_text(text)

        patch.setattr(huggingface.shutil, "copyfile", copy)
        assert "cannot load" in (line := error()) and "ten_dist" in line
    (tmp_path / "library" / "transformers").mkdir(parents=True)
    module = tmp_path / "library" / "transformers" / "__init__.py"
    module.write_text("raise RuntimeError('of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "library")
    assert "RuntimeError: of the user" in error()


def test_weights_that_float16_cannot_hold_are_named(runs, token_data, tmp_path, capsys):
    large = tmp_path / "large"
    shutil.copytree(runs / "ten-exported", large)
    weights = load_file(large / "model.safetensors")
    weights["model.final_norm.weight"] *= 1e5
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    arguments = [*VARIANTS["ten"], *COMMON, "--data", token_data, "--init_from", large]
    arguments += ["--output_dir", tmp_path / "run", "--steps", 1]
    assert main(["train", *map(str, arguments)]) == 0
    output = ["--output", tmp_path / "new", "--dtype", "fp16"]
    line = refusal(capsys, tmp_path / "run", *output)
    assert "final_norm.weight has weights of up to 1" in line
    assert "--dtype bf16" in line

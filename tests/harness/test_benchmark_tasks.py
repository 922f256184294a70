"""Benchmarks of a run through lm-evaluation-harness: what a plain loop over the texts gives."""

import configparser
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch

from ten_dist.cli import main
from ten_dist.generation import Request, Sampling
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel
from tests.tools.launching import ROOT, SMALL_MODEL, launch_environment
from tests.tools.task_files import PROMPTS, QUESTIONS, TEXTS, write_tasks

datasets = pytest.importorskip("datasets")
pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
SEPARATOR = 256
VARIANTS = {"ten": [], "hten": ["--hten_scales", "1,2,4"]}


@pytest.fixture(scope="module", autouse=True)
def without_hub(tmp_path_factory):
    """No hub is asked, and what is read of data sets is kept nowhere else."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder))
        # Read from the environment when they were imported.
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "files")


@pytest.fixture(scope="module")
def runs(token_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, options in VARIANTS.items():
        arguments = [*SMALL_MODEL, *options, "--data", token_data, "--steps", 10]
        arguments += ["--seq_len", 32, "--global_batch_size", 8, "--precision", "fp32"]
        arguments += ["--num_workers", 0, "--learning_rate", "1e-2"]
        arguments += ["--checkpoint_interval", 5, "--output_dir", root / name]
        assert main(["train", *map(str, arguments)]) == 0
    return root


def log_likelihood(network, context, continuation):
    """Of bytes after bytes, by one pass over the whole; and whether all are likeliest."""
    tokens = list(context.encode()) or [SEPARATOR]
    start = len(tokens)
    tokens += continuation.encode()
    with torch.no_grad():
        logprobs = network(torch.tensor([tokens[:-1]])).log_softmax(-1)[0].double()
    logprobs, targets = logprobs[start - 1 :], torch.tensor(tokens[start:])
    picked = logprobs.gather(1, targets[:, None])
    return picked.sum().item(), bool((logprobs.argmax(1) == targets).all())


def plain_figures(network):
    """What lm_eval measures of the tasks, by a loop over the documents."""
    right = normed = 0
    for document in QUESTIONS:
        # Spaces at the end of a context belong to what follows.
        context, choices = document["question"].rstrip(), document["choices"]
        values = [log_likelihood(network, context, "  " + c)[0] for c in choices]
        right += max(range(4), key=values.__getitem__) == document["answer"]
        per_byte = [value / len(c) for value, c in zip(values, choices)]
        normed += max(range(4), key=per_byte.__getitem__) == document["answer"]
    texts = [document["text"] for document in TEXTS]
    nats = -sum(log_likelihood(network, "", text)[0] for text in texts)
    nats /= sum(len(text.encode()) for text in texts)
    return {
        "choosing": {"acc": right / 12, "acc_norm": normed / 12},
        "reading": {
            "byte_perplexity": math.exp(nats),
            "bits_per_byte": nats / math.log(2),
        },
    }


def without_errors(figures):
    return {name: value for name, value in figures.items() if "_stderr" not in name}


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_of_a_plain_loop(variant, runs, tasks, capsys):
    folder = str(runs / variant)
    names = ["--tasks", "choosing,reading", "--include_path", str(tasks)]
    options = [*names, "--checkpoint", "5", "--batch_size", "5", "--json"]
    capsys.readouterr()
    assert main(["evaluate", folder, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = TrainedModel.load(RunFolder(folder), "5")
    assert printed["checkpoint"] == str(model.checkpoint)
    expected = plain_figures(model.network)
    assert printed["tasks"].keys() == expected.keys()
    for task, figures in expected.items():
        found = without_errors(printed["tasks"][task])
        assert found == pytest.approx(figures, abs=1e-5, rel=1e-5)
    # As lines, of fewer documents.
    assert main(["evaluate", folder, *names, "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("checkpoint: ") and "step_00000010" in lines[0]
    assert lines[1].startswith("choosing: acc ")


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_likelihoods_and_texts_of_unequal_requests(variant, runs):
    from lm_eval.api.instance import Instance

    from ten_dist.harness.run_model import RunModel

    model = RunModel(str(runs / variant), batch_size=4)

    def instances(kind, arguments):
        return [
            Instance(kind, {}, given, number) for number, given in enumerate(arguments)
        ]

    pairs = [
        ("", "the wave"),
        ("the state", " of a"),
        ("a" * 70, "é"),
        ("the", " turns"),
    ]
    found = model.loglikelihood(instances("loglikelihood", pairs))
    plain = TrainedModel.load(RunFolder(runs / variant))
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, likeliest = log_likelihood(plain.network, *pair)
        assert value == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert greedy == likeliest

    texts = [("x" * n,) for n in (1, 40, 3000)]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = [log_likelihood(plain.network, "", text)[0] for (text,) in texts]
    assert found == pytest.approx(expected, rel=1e-5)

    prompts = ["", "the state of", *(document["prompt"] for document in PROMPTS[1:])]
    given = [(prompt, {"until": ["e "], "max_gen_toks": 9}) for prompt in prompts]
    written = model.generate_until(instances("generate_until", given))
    decoder = plain.decoder()
    for prompt, text in zip(prompts, written, strict=True):
        request = Request(
            prompt=list(prompt.encode()) or [SEPARATOR],
            max_new_tokens=9,
            sampling=Sampling(temperature=0),
            stop_ids=(SEPARATOR,),
        )
        alone = decoder.add(request)
        while alone.finish_reason is None:
            decoder.step()
        ids = [i for i in alone.ids if i != SEPARATOR]
        assert text == bytes(ids).decode(errors="replace").split("e ")[0]


@pytest.mark.slow
def test_the_command_line_of_lm_eval(runs, tasks, tmp_path, capsys):
    command = [sys.executable, "-m", "ten_dist.harness", "--model", "ten_dist"]
    command += [
        "--model_args",
        f"run={runs / 'hten'},checkpoint=10",
        "--batch_size",
        "4",
    ]
    command += ["--tasks", "choosing,reading,writing", "--include_path", str(tasks)]
    command += ["--output_path", str(tmp_path / "results.json")]
    environment = launch_environment() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = tmp_path.glob("results*.json")
    by_program = json.loads(written.read_text())["results"]
    capsys.readouterr()
    # A pattern may mean tasks of lm_eval as well.
    options = ["--tasks", "choosing,rea?ing,writing", "--include_path", str(tasks)]
    assert main(["evaluate", str(runs / "hten"), *options, "--json"]) == 0
    by_command = json.loads(capsys.readouterr().out)["tasks"]
    for task, figures in by_command.items():
        for name, value in without_errors(figures).items():
            assert by_program[task][f"{name},none"] == pytest.approx(value, rel=1e-6)
    # A mistake is one line.
    command[6] = f"run={tmp_path}"
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert "is not the folder of a run" in last and "Traceback" not in result.stderr


def test_where_lm_eval_looks_for_models_it_finds_this_one():
    from lm_eval.api.registry import Registry

    from ten_dist.harness.run_model import RunModel

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    line = setup["options.entry_points"]["lm_eval.models"].strip()
    name, _, value = line.partition(" = ")
    point = importlib.metadata.EntryPoint(name, value, "lm_eval.models")
    registry = Registry("model")
    registry.register(point.name, target=point)
    assert registry.get("ten_dist") is RunModel


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused(
    runs, tasks, tmp_path, capsys, monkeypatch
):
    def refusal(*options):
        capsys.readouterr()
        assert main(["evaluate", str(runs / "ten"), *map(str, options)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    own = ["--include_path", tasks]
    assert "--limit has no effect without --tasks" in refusal("--limit", 3)
    assert "--seq_len is for a token set" in refusal("--tasks", "a", "--seq_len", 8)
    line = refusal("--tasks", "chosing", *own)
    assert "--tasks chosing: there is no such task, do you mean choosing?" in line
    line = refusal("--tasks", "choosing", "--include_path", tmp_path / "none")
    assert line.endswith("none is no folder")
    write_tasks(tmp_path / "own")
    broken = ["--include_path", tmp_path / "own"]
    (tmp_path / "own" / "reading.jsonl").unlink()
    assert "--tasks reading cannot be loaded" in refusal("--tasks", "reading", *broken)
    (tmp_path / "own" / "writing.yaml").write_text("task: [")
    line = refusal("--tasks", "writing", *broken)
    assert "writing.yaml cannot be read" in line
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "lm_eval" else find(name),
    )
    line = refusal("--tasks", "choosing", *own)
    assert "pip install 'ten_dist[evaluation]'" in line

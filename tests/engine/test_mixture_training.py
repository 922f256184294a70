"""Training on several token sets in proportion."""

import json
from collections import Counter

import pytest

from data_prep.shard import main as prepare
from ten_dist.cli import main
from ten_dist.data import Manifest, Mixture, RowOrder
from tests.conftest import write_corpus
from tests.tools.launching import SMALL_MODEL, read_metrics, step_metrics, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two folders of byte tokens, with held-out sets."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("code", "prose")):
        corpus = write_corpus(folder / f"{name}-text", files=30 + 20 * seed, seed=seed)
        arguments = ["--input", corpus, "--output", folder / name]
        arguments += ["--tokenizer", "bytes", "--val_fraction", "0.2"]
        assert prepare([str(a) for a in arguments]) == 0
    return folder


def options(sources, folder, **changes):
    values = {
        "data": f"code={sources}/code:3,prose={sources}/prose:1",
        "output_dir": folder,
        "steps": 6,
        "seq_len": 48,
        "global_batch_size": 8,
        "precision": "fp32",
        "num_workers": 0,
        "eval_interval": 3,
        **changes,
    }
    return [
        *SMALL_MODEL,
        *(f"--{name}={value}" for name, value in values.items() if value is not None),
    ]


def test_two_ranks_train_on_a_mixture_and_report_its_sources(sources, tmp_path):
    train([*options(sources, tmp_path / "run"), "--ledger"], ranks=2)
    mixture = Mixture(
        ("code", "prose"),
        (Manifest.load(sources / "code"), Manifest.load(sources / "prose")),
        (0.75, 0.25),
    )
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / "ledger").iterdir())
        for line in path.read_text().splitlines()
    ]
    for name, manifest, count in zip(
        mixture.names, mixture.manifests, mixture.rows_before(48), strict=True
    ):
        rows = [r for line in lines if line["source"] == name for r in line["rows"]]
        expected = RowOrder(manifest, 48, 0).rows(0, count)[1]
        assert sorted(rows) == sorted(expected.tolist())
    metrics = read_metrics(tmp_path / "run")
    steps = [line for line in metrics if "loss" in line]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        number, counts = step["step"], Counter()
        for line in lines:
            if line["step"] == number:
                counts[line["source"]] += len(line["rows"])
        mean = sum(step[f"ce_loss/{name}"] * n for name, n in counts.items()) / 8
        assert mean == pytest.approx(step["ce_loss"], rel=1e-5)
        read = mixture.rows_before(8 * number)
        for name, rows, epoch in zip(mixture.names, read, mixture.rows(48)):
            assert step[f"epochs/{name}"] == pytest.approx(rows / epoch)
    validations = [line for line in metrics if "val_loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    for line in validations:
        parts = (line["val_loss/code"], line["val_loss/prose"])
        assert line["val_loss"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])


def test_one_rank_reads_the_same_and_the_run_is_used(sources, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *options(sources, run)]) == 0
    assert "code: 75.00% of the rows" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 2
    assert f"{sources}/prose/val (prose)" in capsys.readouterr().err
    held_out = str(sources / "prose" / "val")
    arguments = ["evaluate", str(run), "--data", held_out, "--unigram_baseline"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["val_loss"] == pytest.approx(
        step_metrics(run, "val_loss/prose")[6], rel=1e-4
    )
    assert 2 < figures["unigram_loss"] < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None, "epochs": 1}, "--epochs says nothing of a mixture"),
        ({"data": "code=nowhere:1,prose=nowhere:2"}, "nowhere has no manifest.json"),
        ({"data": "code=A:1,prose=B"}, "'prose=B' is not NAME=DATA:WEIGHT"),
        ({"data_cache": "cache"}, "--data_cache has no effect with local --data"),
    ],
)
def test_refusals(sources, tmp_path, capsys, changes, message):
    arguments = options(sources, tmp_path / "run", **changes)
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_proportions_are_another_run(sources, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *options(sources, run, steps=2)]) == 0
    data = f"code={sources}/code:1,prose={sources}/prose:1"
    assert main(["train", *options(sources, run, steps=2, data=data)]) == 2
    assert "holds a run with other options: data was" in capsys.readouterr().err

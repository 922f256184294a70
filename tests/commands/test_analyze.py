"""What a model has learned, as figures and as a page in a browser."""

import importlib.util
import json

import pytest

from data_prep.shard import main as prepare
from ten_dist.cli import main
from tests.tools.browser import opened
from tests.tools.launching import SMALL_MODEL

TEXT = "the state </script><b>decays</b> & turns\n\tand a wave — é\n"
QUICK = ["--rows", "4", "--context_tokens", "2048"]


@pytest.fixture(scope="module")
def output(short_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "text.txt").write_text(TEXT)
    command = ["analyze", short_run, "--output", folder / "of", *QUICK]
    command += ["--text", folder / "text.txt"]
    assert main([str(part) for part in command]) == 0
    return folder / "of"


def test_figures_are_of_every_place_and_of_the_loss_that_evaluate_gives(
    output, short_run, capsys
):
    found = json.loads((output / "analysis.json").read_text())
    places = [(place["layer"], place["scale"]) for place in found["places"]]
    assert places == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
    assert all(len(place["alpha"]) == 8 for place in found["places"])
    assert all(0 < place["bound_ratio"] <= 1 for place in found["places"])
    assert bytes(found["text"]["tokens"][1:]) == TEXT.encode()
    contexts = [loss["context"] for loss in found["context"]["losses"]]
    assert contexts == [2**n for n in range(4, 13)]
    capsys.readouterr()
    assert main(["evaluate", str(short_run), "--max_rows", "4", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["val_loss"]
    assert found["loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 800}},
    ],
)
def test_the_page_draws_everything_and_answers(output, look):
    page_file = output / "analysis.html"
    assert page_file.stat().st_size < 3e6
    with opened(page_file.as_uri(), **look) as (page, complaints):
        figures = page.locator("[role=img] > svg")
        assert figures.count() == 6
        for number in range(6):
            box = figures.nth(number).bounding_box()
            assert box["width"] > 300 and box["height"] > 100
        wide = "document.documentElement.scrollWidth > window.innerWidth"
        assert not page.evaluate(wide)
        tokens = page.locator("#text button")
        assert tokens.count() == 1 + len(TEXT.encode())
        assert "</script><b>decays" in "".join(tokens.all_inner_texts())
        colours = "[...document.querySelectorAll('#text button')].map(b => b.style.background)"
        seen = [page.evaluate(colours)]
        page.get_by_label("Colour", exact=True).select_option("erased")
        seen.append(page.evaluate(colours))
        page.get_by_label("Place").select_option("layer 2, scale 4")
        seen.append(page.evaluate(colours))
        assert seen[0] != seen[1] != seen[2]
        # A step of scale 4 has four tokens.
        assert len(set(seen[2])) <= 2 + len(tokens.all()) // 4
        tokens.nth(7).click()
        assert "Token 8" in page.locator("#detail").inner_text()
        assert page.locator("#detail tbody tr").count() > 0
        assert complaints == []


def test_what_cannot_be_analyzed_is_one_line(short_run, tmp_path, capsys, monkeypatch):
    def refusal(*arguments):
        capsys.readouterr()
        assert main(["analyze", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no config.json" in refusal(tmp_path)
    assert "--checkpoint 99" in refusal(short_run, "--checkpoint", 99)
    assert "--text" in refusal(short_run, "--text", tmp_path / "absent")
    (tmp_path / "empty.txt").touch()
    assert "no tokens" in refusal(short_run, "--text", tmp_path / "empty.txt")
    assert "--output" in refusal(short_run, "--output", tmp_path / "empty.txt")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("a")
    shards = ["--input", tmp_path / "short", "--output", tmp_path / "data"]
    assert prepare([*map(str, shards), "--tokenizer", "bytes"]) == 0
    assert "too few for one row" in refusal(short_run, "--data", tmp_path / "data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "ten_dist[analysis]" in refusal(short_run)
    assert not (short_run / "analysis").exists()


def test_a_model_of_attention_has_no_eigenstates(token_data, tmp_path, capsys):
    command = ["train", *SMALL_MODEL[:6], "--num_heads", 2, "--mixer", "attention"]
    command += ["--data", token_data, "--output_dir", tmp_path / "run", "--steps", 1]
    command += ["--seq_len", 32, "--num_workers", 0]
    assert main([str(part) for part in command]) == 0
    capsys.readouterr()
    assert main(["analyze", str(tmp_path / "run")]) == 2
    assert "--mixer attention" in capsys.readouterr().err

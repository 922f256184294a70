"""Runs compared on a page: killed, rolled back and damaged ones too, in a browser."""

import json
import math
import random
import shutil

import pytest

from ten_dist.cli import main
from tests.tools.browser import opened

# How many pixels of a chart are not of its background.
INKED = """canvas => {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let count = 0;
  for (let at = 3; at < pixels.length; at += 4) count += pixels[at] > 0;
  return count;
}"""
PICTURE = "canvas => canvas.toDataURL()"


def trained(source, folder, steps=3000, **training):
    """A run that did many steps, as its folder would be."""
    shutil.copytree(source, folder)
    record = json.loads((folder / "config.json").read_text())
    record["training"].update(training)
    record["schedule"]["steps"] = 3000
    (folder / "config.json").write_text(json.dumps(record))
    draw = random.Random(steps)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss = 3 + 4 * math.exp(-step / 500) + draw.gauss(0, 0.05)
            metrics = {"step": step, "tokens": step * 4096, "loss": loss}
            metrics |= {"ce_loss": loss + 100 * (step == 777), "step_seconds": 0.36}
            file.write(json.dumps(metrics | {"tokens_per_second": 10_000.0}) + "\n")
            if step % 100 == 0:
                held_out = {"val_loss": loss, "val_bits_per_byte": loss / 2}
                file.write(json.dumps({"step": step, **held_out}) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(short_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    whole = trained(short_run, folder / "whole")
    killed = trained(short_run, folder / "</script>killed", 1500, learning_rate=0.123)
    (killed / "COMPLETED").unlink()
    with open(killed / "metrics.jsonl", "a") as file:
        # Steps that a rollback has done again, and a line that a kill has cut off.
        file.write(json.dumps({"step": 1400, "val_loss": 2.5}) + "\n")
        file.write('{"step": 1501, "lo')
    anomaly = {"step": 777, "kind": "spike", "batch": 776}
    (killed / "anomalies.jsonl").write_text(json.dumps(anomaly) + "\n{cut")
    (killed / "tensorboard" / "events.out.tfevents.9999.x").write_bytes(b"garbage")
    return [whole, killed]


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory):
    page = tmp_path_factory.mktemp("report") / "of" / "runs.html"
    page.parent.mkdir()
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    return page


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 800}},
    ],
)
def test_runs_are_compared_and_drawn(page_file, look):
    assert page_file.stat().st_size < 1e6
    with opened(page_file.as_uri(), **look) as (page, complaints):
        summary = page.locator("#summary").inner_text()
        assert "3,000 of 3,000" in summary and "1,500 of 3,000" in summary
        assert "not complete" in summary and "1, at steps 777" in summary
        assert page.locator("#options tbody").inner_text().split()[-1] == "0.123"
        charts = page.locator("#charts canvas")
        titles = page.locator("#charts h3").all_inner_texts()
        assert titles[:2] == ["held-out bits per byte", "held-out loss, nats a token"]
        for number in range(charts.count()):
            assert charts.nth(number).evaluate(INKED) > 500
        wide = "document.documentElement.scrollWidth > window.innerWidth"
        assert not page.evaluate(wide)
        assert complaints == []


def test_controls_do_what_they_say(page_file):
    with opened(page_file.as_uri()) as (page, complaints):
        chart = page.get_by_label("cross-entropy, nats a token")
        seen = [chart.evaluate(PICTURE)]

        def changed():
            seen.append(chart.evaluate(PICTURE))
            return seen[-1] != seen[-2]

        page.get_by_label("Over").select_option("hours")
        assert changed()
        page.get_by_label("Smoothed").fill("0.95")
        assert changed()
        page.get_by_label("whole").uncheck()
        assert changed()
        page.get_by_label("whole").check()
        assert changed()
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        page.mouse.move(box["x"] + 150, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 250, box["y"] + 60)
        assert "whole: " in chart.locator("+ .value").inner_text()
        page.mouse.up()
        assert changed()
        page.get_by_role("button", name="Whole range").click()
        assert changed()
        assert seen[-1] == seen[-3]
        assert complaints == []


def test_what_is_no_run_is_told_and_left_out(runs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "page.html")]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    new = tmp_path / "new"
    shutil.copytree(runs[0], new)
    (new / "metrics.jsonl").write_text("\0\n[1]\n")
    for folder in (tmp_path / "absent", tmp_path / "foreign", new):
        capsys.readouterr()
        assert main(["report", str(folder), *output]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
    assert main(["report", str(new), str(runs[0]), *output]) == 0
    assert "left out: " in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--output", str(tmp_path)]) == 2

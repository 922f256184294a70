"""The ladder: its rungs grow, its curve is the one that made the points, its corpus is made once."""

import dataclasses
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from benchmarks.fitting import make_model
from benchmarks.ladder import MODELS, PowerLaw, fit_power_law, fitted, make_ladder, rung
from benchmarks.quality_results import Results
from tests.tools.launching import ROOT


def test_a_fitted_curve_is_the_one_of_the_points():
    law = PowerLaw(1.5, 40.0, 0.25)
    tokens = [5e6, 2e7, 8e7]
    losses = [law.a + law.b * x**-law.c for x in tokens]
    found = fit_power_law(tokens, losses)
    assert found.a == pytest.approx(law.a, abs=1e-6)
    assert found.b == pytest.approx(law.b, rel=1e-6)
    assert found.c == pytest.approx(law.c)


def test_a_curve_never_ends_below_nothing():
    assert fit_power_law([1.0, 2.0, 4.0], [3.0, 2.0, 0.5]).a == 0.0


def test_a_curve_takes_three_rungs(tmp_path):
    with pytest.raises(ValueError, match="three rungs"):
        fit_power_law([1.0, 2.0, 2.0], [3.0, 2.0, 2.1])
    results = Results(tmp_path / "ladder.json")
    model = next(iter(MODELS))
    for multiple, loss in ((1, 3.0), (4, 2.5)):
        results.add(
            rung(model, multiple), 0, {"loss": loss, "seconds": 10.0 * multiple}
        )
    assert "not yet" in fitted(results).splitlines()[2]
    results.add(rung(model, 16), 0, {"loss": 2.25, "seconds": 160.0})
    # Each time the loss falls by half as much: by the fourth power, tokens to the -1/2.
    assert "2.000 +" in fitted(results).splitlines()[2]
    assert (
        Results(tmp_path / "ladder.json").content["curves"][model]["seconds"]["c"]
        == 0.5
    )


def test_models_of_a_rung_are_of_one_size():
    sizes = {}
    for name, config in MODELS.items():
        model = make_model(dataclasses.replace(config, vocab_size=4096))
        sizes.setdefault(name.split(", ")[1], []).append(model.num_parameters())
    assert all(max(of) / min(of) < 1.01 and len(of) == 2 for of in sizes.values())


STUBS = {
    "apt-cache": 'test "$2" = linux-source && echo "  Depends: linux-source-6.1" || echo "$2"',
    "apt-get": 'echo "$2" >> "$FETCHED"; cp "$PACKAGE" "$2_1_all.deb"',
    "dpkg-deb": 'cat "$2"',
}


def run_corpus(tmp_path, path):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.ladder_corpus", tmp_path / "corpus"],
        env={**os.environ, "PATH": str(path), "PACKAGE": str(tmp_path / "package")}
        | {"FETCHED": str(tmp_path / "fetched"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_corpus_is_fetched_and_picked_once(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as source:
        library = Path(sysconfig.get_path("stdlib"))
        for path in [*library.glob("[a-d]*.py"), *library.glob("[a-m]*/*.py")]:
            source.add(path, f"linux-source-6.1/kernel/{path.relative_to(library)}")
        source.add(library / "enum.py", "linux-source-6.1/drivers/gpu/enum.py")
    with tarfile.open(tmp_path / "package", "w") as package:
        member = tarfile.TarInfo("./usr/src/linux-source-6.1.tar.xz")
        member.size = len(inner.getvalue())
        package.addfile(member, io.BytesIO(inner.getvalue()))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, script in STUBS.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    first = run_corpus(tmp_path, path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "corpus/shards/val/manifest.json").is_file()
    names = [p.name for p in (tmp_path / "corpus/text").rglob("*.py")]
    assert "bisect.py" in names and "enum.py" not in names
    fetched = (tmp_path / "fetched").read_text().split()
    assert fetched == ["linux-source-6.1", "python3-doc", "git-doc"]
    again = run_corpus(tmp_path, path)
    assert again.returncode == 0
    assert (tmp_path / "fetched").read_text().split() == fetched
    experiment = make_ladder(tmp_path / "corpus/shards")
    steps = [experiment.recipe_of(variant).steps for variant in experiment.variants]
    assert steps[:4] == [640, 640, 2560, 2560] and max(steps) == 16 * 640


def test_without_apt_get_a_sentence_says_so(tmp_path):
    done = run_corpus(tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "benchmarks.ladder_corpus: apt-cache is not there: "
        "this needs a machine with Debian or Ubuntu\n"
    )

"""The package that users install: built from a checkout, used without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import ten_dist
from ten_dist.cli import main
from tests.tools.launching import ROOT, SMALL_MODEL, launch_environment

PACKAGED = ("ten_dist", "launch", "data_prep", "ds_configs", "README.md")
PACKAGED += ("setup.cfg", "pyproject.toml")


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=launch_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel that was built from the source distribution, and in `direct`
    one that was built from the sources themselves."""
    folder = tmp_path_factory.mktemp("package")
    # Building writes beside the sources, which other tests read.
    sources = folder / "sources"
    sources.mkdir()
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    build = ["-m", "build", "--no-isolation", "--outdir"]
    run(*build, folder, cwd=sources)
    run(*build, folder / "direct", "--wheel", cwd=sources)
    return folder


@pytest.mark.slow
def test_metadata_is_what_an_index_accepts(built):
    packages = list(built.glob("ten_dist-*"))
    checked = run("-m", "twine", "check", "--strict", *packages, cwd=built)
    assert len(packages) == 2 and checked.count("PASSED") == 2


@pytest.mark.slow
def test_both_ways_of_building_give_the_same_wheel(built):
    (wheel,) = built.glob("*.whl")
    with (
        zipfile.ZipFile(wheel) as by_sdist,
        zipfile.ZipFile(built / "direct" / wheel.name) as direct,
    ):
        assert by_sdist.namelist() == direct.namelist()
        assert [f.CRC for f in by_sdist.infolist()] == [
            f.CRC for f in direct.infolist()
        ]
    assert wheel.name.startswith(f"ten_dist-{ten_dist.__version__}-")


@pytest.mark.slow
def test_a_wheel_trains_evaluates_and_generates_anywhere(built, token_data, tmp_path):
    (wheel,) = built.glob("*.whl")
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    run(*pip, "--target", target, wheel, cwd=empty)
    here = {"cwd": empty, "PYTHONPATH": str(target)}
    found = run("-c", "import ten_dist; print(ten_dist.__file__)", **here)
    assert found.strip() == str(target / "ten_dist" / "__init__.py")
    train = [*SMALL_MODEL, "--data", token_data, "--output_dir", "run", "--steps", 2]
    train += ["--global_batch_size", 4, "--seq_len", 32]
    ten_dist_command = ["-m", "ten_dist"]
    run(*ten_dist_command, "train", *train, **here)
    completed = json.loads((empty / "run" / "COMPLETED").read_text())
    assert completed["step"] == 2
    output = run(*ten_dist_command, "evaluate", "run", "--json", **here)
    evaluated = json.loads(output.splitlines()[-1])
    assert evaluated["val_loss"] == pytest.approx(completed["val_loss"], rel=1e-5)
    generate = ["generate", "run", "--prompt", "the", "--max_new_tokens", 4]
    assert run(*ten_dist_command, *generate, **here).startswith("the")
    # What other commands read of the package.
    run(*ten_dist_command, "plan", "--config", "pico", "--steps", 1, **here)
    script = target / "bin" / "ten-dist"
    assert os.access(script, os.X_OK)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    version = capsys.readouterr().out.split()[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", version) and version == ten_dist.__version__

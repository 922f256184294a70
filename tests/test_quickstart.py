"""The quickstart, shortened: it trains, and then it has nothing left to do."""

import json
import re
import subprocess

import pytest

from tests.tools.launching import ROOT, launch_environment


def quickstart(folder):
    environment = launch_environment()
    del environment["OMP_NUM_THREADS"]
    environment |= {"STEPS": "12", "SEQ_LEN": "128", "GLOBAL_BATCH_SIZE": "16"}
    # Threads that wait for each other would spin, and other tests want the cores, too.
    environment["OMP_WAIT_POLICY"] = "passive"
    # All held-out rows are evaluated, both times.
    environment["VAL_FRACTION"] = "0.005"
    result = subprocess.run(
        ["bash", "launch/quickstart.sh", "--output_dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_quickstart_trains_and_then_is_complete(tmp_path):
    output = quickstart(tmp_path)
    assert "HTEN 1,2,4" in output
    assert re.search(r"x 2 ranks", output)
    held_out = re.search(r"held-out loss ([\d.]+)", output)[1]
    unigram = float(re.search(r"unigram loss ([\d.]+)", output)[1])
    # Twelve short steps: below a uniform guess over 4096 tokens, ln 4096 = 8.3.
    assert float(held_out) < 8.2 and 4 < unigram < 8.2
    assert "tensorboard --logdir" in output
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["deepspeed"]["zero_optimization"]["stage"] == 2
    before = written(tmp_path)
    again = quickstart(tmp_path)
    assert "The quickstart is complete." in again and f"loss {held_out}" in again
    assert "== " not in again and "environment:" not in again
    assert written(tmp_path) == before
    (tmp_path / "sample.txt").unlink()
    again = quickstart(tmp_path)
    assert "is already prepared" in again and "is complete: 12 steps" in again
    assert "== generate" in again and "== evaluate" not in again
    assert written(tmp_path).keys() == before.keys()


def written(folder):
    """When each file of a folder was written, by its path."""
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_wrong_argument_is_named(tmp_path):
    result = subprocess.run(
        ["bash", "launch/quickstart.sh", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "unknown argument '--output'" in result.stderr

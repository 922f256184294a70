"""The commands of the README and of docs/ run, and the table of presets is measured."""

import os
import re
import resource
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.monitor.metrics_log import read_metrics
from tests.conftest import write_corpus
from tests.tools.documents import code_blocks
from tests.tools.launching import ROOT, free_port, launch_environment

README = ROOT / "README.md"
# In the order in which a reader makes what the next page needs.
RUN_PAGES = [
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("data", "training", "checkpoints", "failures", "planning")
    ),
    ROOT / "docs" / "multi_node.md",
]
# Run by tests/test_quickstart.py, by .ci/run, and by both of them.
ELSEWHERE = {"bash launch/quickstart.sh", "bash tests/run.sh"}
# What makes a documented training small enough for a test; the rest stays as it is.
SMALLER = {
    "--tokens": ("--steps", "2"),
    "--steps": ("--steps", "2"),
    "--seq_len": ("--seq_len", "32"),
    "--global_batch_size": ("--global_batch_size", "4"),
    "--master_addr": ("--master_addr", "127.0.0.1"),
}
SMALL_TRAINING = [
    "--dim",
    "48",
    "--n_layers",
    "2",
    "--num_eigenstates",
    "24",
    "--num_heads",
    "2",
    "--num_workers",
    "0",
]


def documented_commands():
    """The commands of the blocks that are to be run, each once."""
    blocks = [b.strip() for page in RUN_PAGES for b in code_blocks(page, "bash")]
    return list(dict.fromkeys(blocks))


def made_small(command, folder):
    """The words of a documented command, with the folders and sizes of a test."""
    words = shlex.split(command)
    if "--dry_run" in words or words[:2] == ["ten-dist", "plan"]:
        return words
    result = []
    for word in words:
        if result and result[-1] in SMALLER:
            result[-1:] = SMALLER[result[-1]]
        elif re.fullmatch(r"(CORPUS|DATA|RUN)\w*(/[\w.]+)?|hostfile", word):
            result.append(str(folder / word))
        else:
            result.append(word)
    if words[:2] == ["ten-dist", "preflight"]:
        result += ["--min_free_gigabytes", "0", "--master_port", str(free_port())]
    if "launch/train.py" in words or words[1] in ("train", "launch"):
        result += SMALL_TRAINING
        for option, value in (("--seq_len", "32"), ("--global_batch_size", "4")):
            if option not in words:
                result += [option, value]
    if "deepspeed" in words:
        options = ["--master_port", str(free_port())]
        if "--hostfile" not in words:
            options += ["--num_accelerators", "2"]
        else:
            options += ["--no_ssh_check"]
        at = result.index("deepspeed") + 1
        result[at:at] = options
    return result


@pytest.mark.slow
def test_commands_run_in_their_order(tmp_path):
    write_corpus(tmp_path / "CORPUS", files=60)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    environment = {
        **launch_environment(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    commands = documented_commands()
    assert len(commands) >= 16
    for command in commands:
        if command in ELSEWHERE:
            continue
        if command.startswith("source "):
            # test_environment_is_entered_as_documented runs it.
            continue
        words = made_small(command, tmp_path)
        if words[0] == "tensorboard":
            assert_tensorboard_serves(words, environment)
            continue
        result = subprocess.run(
            words,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, f"{command}\n{output[-4000:]}"
        # The largest model, too, on a machine of this size.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        assert peak < 24 * 2**30, command
    runs = sorted(path.parent.name for path in tmp_path.glob("*/COMPLETED"))
    assert runs == ["RUN", "RUN_HTEN", "RUN_LARGE", "RUN_SUPERVISED", "RUN_XLARGE"]
    assert metrics_of(tmp_path) <= described_metrics()


def metrics_of(folder):
    """Names of all metrics that the runs in a folder have written."""
    lines = [m for path in folder.glob("*/metrics.jsonl") for m in read_metrics(path)]
    return {name for metrics in lines for name in metrics}


def described_metrics():
    page = (ROOT / "docs" / "run_folder.md").read_text()
    return set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="run by tests/run.sh")
def test_environment_is_entered_as_documented():
    (command,) = [c for c in documented_commands() if c.startswith("source ")]
    result = subprocess.run(
        ["bash", "-c", f"{command} && command -v ten-dist && ten-dist --help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(ROOT / ".venv" / "bin" / "ten-dist"))


def assert_tensorboard_serves(words, environment):
    """Start it, and find the scalars of the run through its web interface."""
    port = free_port()
    process = subprocess.Popen(
        [*words, "--port", str(port), "--host", "127.0.0.1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
        deadline = time.monotonic() + 90
        tags = b"{}"
        while b"train/ce_loss" not in tags:
            assert time.monotonic() < deadline, tags
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(address, timeout=10) as reply:
                    tags = reply.read()
            except OSError:
                assert process.poll() is None
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_python_example_runs():
    (example,) = code_blocks(ROOT / "docs" / "model.md", "python")
    shown = (
        "print((logits[:, 20:] - rest).abs().max() < 1e-4, [*map(len, continuations)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{example}\n{shown}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "tensor(True) [8, 8]\n", result.stderr


def test_table_of_presets_is_measured():
    rows = re.findall(
        r"^\| (\w+) \| (.* \| [\d,]+) \|$", README.read_text(), re.MULTILINE
    )
    table = {name: cells.split(" | ") for name, cells in rows}
    assert list(table) == list(PRESETS)
    for name, (scales, energy, dim, layers, eigenstates, parameters) in table.items():
        config = TemporalEigenstateConfig.preset(name)
        with torch.device("meta"):
            count = TemporalEigenstateNetwork(config).num_parameters()
        joined = ",".join(map(str, config.hten_scales or ()))
        assert scales == (joined or "-")
        assert float(energy) == config.energy_reg_weight
        assert [int(dim), int(layers)] == [config.dim, config.n_layers]
        assert int(eigenstates) == config.num_eigenstates
        assert parameters == f"{count:,}"

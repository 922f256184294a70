"""Ranks that cannot meet say in one line which option of the launcher to change."""

import socket
import subprocess
import sys

import pytest

from ten_dist.cli import main
from tests.tools.launching import ROOT, SMALL_MODEL, launch_environment


@pytest.fixture
def arguments(token_data, tmp_path):
    return [
        *("train", *SMALL_MODEL, "--data", str(token_data), "--steps", "2"),
        *("--output_dir", str(tmp_path / "run"), "--global_batch_size", "4"),
    ]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "-1"),
        ("MASTER_PORT", "29500.0"),
        ("MASTER_PORT", "http"),
        ("MASTER_ADDR", "node..local"),
        ("MASTER_ADDR", "x" * 70),
        ("MASTER_ADDR", "10.0.0.1:29500"),
    ],
)
def test_no_place_to_meet(capsys, monkeypatch, tmp_path, arguments, variable, value):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", variable: value}
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{variable} is '{value}'" in line
    assert f"--{variable.lower()}" in line
    assert not (tmp_path / "run").exists()


def test_port_in_use(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {
            **launch_environment(),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ended = subprocess.run(
            [sys.executable, "-m", "ten_dist.cli", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "ten-dist" in line]
    assert len(lines) == 1 and f"port {port} is in use" in lines[0]
    assert "--master_port" in lines[0]
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not (tmp_path / "run").exists()

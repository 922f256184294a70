"""A server as a process of its own, over a small trained run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import httpx2 as httpx
import pytest

from ten_dist.cli import main
from tests.tools.launching import ROOT, SMALL_MODEL, free_port

RUN = [
    *(*SMALL_MODEL, "--hten_scales", "1,2,4", "--short_convolution", 3),
    *("--seq_len", 64, "--global_batch_size", 8, "--steps", 6, "--precision", "fp32"),
    *("--num_workers", 0, "--learning_rate", "1e-2"),
]


class Server:
    """A `ten-dist serve` that listens."""

    def __init__(self, process, port):
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options):
        import openai

        options = {"api_key": "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def connection(self, body, length=None):
        """A connection with a request for a completion, of a longer body if need be."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        size = len(body) if length is None else length
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {size}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        return connection

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])


@contextlib.contextmanager
def served(run, *options, environment=None):
    """A server with some options, until the end of the block."""
    port = free_port()
    command = [sys.executable, "-m", "ten_dist", "serve", run, "--port", port, *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
    try:
        for line in process.stdout:
            if "serving" in line:
                break
        else:
            pytest.fail("the server has ended before it listened")
        yield Server(process, port)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert "Traceback" not in output, output


@pytest.fixture(scope="session")
def run_folder(token_data, tmp_path_factory):
    """A run of a hierarchy with a short convolution."""
    folder = tmp_path_factory.mktemp("serving") / "tiny"
    arguments = [*RUN, "--data", token_data, "--output_dir", folder]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


@pytest.fixture(scope="session")
def server(run_folder):
    """A server that the tests share."""
    with served(run_folder, "--slots", 16, "--max_new_tokens", 10**5) as server:
        yield server

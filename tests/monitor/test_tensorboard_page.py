"""TensorBoard of a run, in a browser: what matters on one page, and the run's options."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest

from tests.tools.browser import opened
from tests.tools.launching import SMALL_MODEL, free_port, train_here


@contextlib.contextmanager
def tensorboard(folder):
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--logdir", str(folder)],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_charts_and_options_are_shown(token_data, tmp_path):
    run = tmp_path / "run"
    options = [*SMALL_MODEL, "--steps", 2, "--seq_len", 32, "--num_workers", 0]
    for steps in (2, 3):
        # A start that goes on says the same again, and it stands there once.
        options[options.index("--steps") + 1] = steps
        more = ["--extend"] if steps == 3 else []
        train_here([*options, "--data", token_data, "--output_dir", run, *more])
    with (
        tensorboard(run / "tensorboard") as url,
        opened(f"{url}/#custom_scalars") as (page, complaints),
    ):
        page.get_by_text("gradient norm").wait_for()
        for title in ("learning", "speed", "loss", "energy", "tokens a second"):
            assert page.get_by_text(title, exact=True).count() == 1
        # A chart has drawn both curves of the loss.
        page.get_by_text("Matches (2)").first.wait_for()
        page.goto(f"{url}/#text")
        page.reload()
        page.get_by_role("cell", name="model/num_eigenstates").first.wait_for()
        assert complaints == []

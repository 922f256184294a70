"""A run to be used."""

import pytest

from ten_dist.cli import main
from tests.tools.launching import SMALL_MODEL


@pytest.fixture(scope="session")
def short_run(token_data, tmp_path_factory):
    """An HTEN run of two steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    arguments = [*SMALL_MODEL, "--hten_scales", "1,2,4", "--data", token_data]
    arguments += ["--output_dir", folder, "--steps", 2, "--seq_len", 32]
    arguments += ["--precision", "fp32", "--num_workers", 0]
    assert main(["train", *map(str, arguments)]) == 0
    return folder

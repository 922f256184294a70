"""What the environment of ranks is made of."""

import pytest

from launch.rank_environment import (
    interface_towards,
    rank_environment,
    with_interface,
)
from ten_dist.errors import ConfigurationError


def test_what_is_given_counts_most_and_the_nearer_file_more(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in (
        (home, "A=home\nB=home\nNCCL_DEBUG=INFO\n"),
        (here, "# a comment, and a blank line\n\nB=here\nC=x=y z\n"),
    ):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text, encoding="utf-8-sig")
    environment = {"NCCL_DEBUG": "WARN", "DS_ACCELERATOR": "cpu", "SECRET": "1"}
    assert rank_environment(["A=given"], environment, [home, here]) == {
        "A": "given",
        "B": "here",
        "C": "x=y z",
        "NCCL_DEBUG": "INFO",
        "DS_ACCELERATOR": "cpu",
    }


def test_what_is_no_variable_is_refused_by_line(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    with pytest.raises(ConfigurationError, match=r"line 2: `export B=2` is not NAME"):
        rank_environment([], {}, [tmp_path])
    (tmp_path / ".deepspeed_env").write_bytes(b"A=\xe9\n")
    with pytest.raises(ConfigurationError, match="deepspeed_env cannot be read: it is"):
        rank_environment([], {}, [tmp_path])
    with pytest.raises(ConfigurationError, match="--env `A` is not NAME=VALUE"):
        rank_environment(["A"], {}, [])


def test_the_interface_is_that_on_the_way_unless_named():
    assert interface_towards("127.0.0.1") == "lo"
    assert with_interface({"GLOO_SOCKET_IFNAME": "eth7"}, "eth1") == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth7",
    }

"""Hostfiles, lists of hosts and Slurm allocations."""

import pytest

from launch.hosts import (
    Host,
    check_names,
    is_own,
    own_addresses,
    parse_hosts,
    read_hostfile,
    slurm_hosts,
    write_hostfile,
)
from ten_dist.errors import ConfigurationError


def test_a_hostfile_survives_writing_and_reading(tmp_path):
    hosts = [Host("10.0.0.2", 8), Host("gpu-3.example", 4)]
    write_hostfile(tmp_path / "hostfile", hosts)
    assert read_hostfile(tmp_path / "hostfile") == hosts


def test_comments_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# the nodes\n\n10.0.0.2 slots=2  # first\n")
    assert read_hostfile(path) == [Host("10.0.0.2", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.2\n", "line 1: `10.0.0.2`"),
        ("a slots=1\nb slots=two\n", "line 2: `b slots=two`"),
        ("a slots=0\n", "a has no slots"),
        ("a slots=1\na slots=2\n", "names a twice"),
        ("-oProxyCommand=x slots=1\n", "not the address of a host"),
        ("# nothing\n", "names no host"),
        (
            "ubuntu@10.0.0.2 slots=1\n",
            "`ubuntu@10.0.0.2` names a user: write `10.0.0.2`, and give --ssh_user ubuntu",
        ),
    ],
)
def test_a_wrong_hostfile_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_hostfile(path)


def test_a_hostfile_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "utf16").write_text("a slots=1\n", encoding="utf-16")
    (tmp_path / "latin").write_bytes(b"# caf\xe9\na slots=1\n")
    for name, reason in (
        ("nowhere", "No such file or directory; it has a line `ADDRESS"),
        ("", "Is a directory"),
        ("utf16", "it is UTF-16: `iconv -f UTF-16 -t UTF-8` converts it"),
        ("latin", "it is not text in UTF-8"),
    ):
        with pytest.raises(ConfigurationError, match=f"cannot be read: {reason}"):
            read_hostfile(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_an_address(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("10.0.0.2 slots=2\n", encoding="utf-8-sig")
    assert read_hostfile(path) == [Host("10.0.0.2", 2)]


def test_a_list_gives_slots_and_addresses():
    assert parse_hosts("10.0.0.2:8, node3,[fd00::2]:4,fd00::3") == [
        Host("10.0.0.2", 8),
        Host("node3", 1),
        Host("fd00::2", 4),
        Host("fd00::3", 1),
    ]
    with pytest.raises(ConfigurationError, match="--hosts names a twice"):
        parse_hosts("a:1,a:2")
    with pytest.raises(ConfigurationError, match="--hosts"):
        parse_hosts("")
    with pytest.raises(ConfigurationError, match="give --ssh_user root"):
        parse_hosts("root@a:1")


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, [8, 8, 8]),
        ({"SLURM_GPUS_ON_NODE": "4"}, [4, 4, 4]),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, [2, 2, 1]),
    ],
)
def test_a_slurm_allocation_is_read(variables, slots):
    nodes = {"SLURM_JOB_NODELIST": "gpu[08-09],big1"}
    found = slurm_hosts(nodes | variables)
    assert [host.address for host in found] == ["gpu08", "gpu09", "big1"]
    assert [host.slots for host in found] == slots


def test_a_slurm_allocation_without_slots_or_none_at_all_is_refused():
    with pytest.raises(ConfigurationError, match="SLURM_JOB_NODELIST is not set"):
        slurm_hosts({})
    with pytest.raises(ConfigurationError, match="--ntasks-per-node"):
        slurm_hosts({"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_TASKS_PER_NODE": "1"})


def test_names_that_no_other_machine_could_use_are_refused():
    with pytest.raises(ConfigurationError, match="nowhere.invalid does not resolve"):
        check_names([Host("nowhere.invalid", 1)])
    with pytest.raises(ConfigurationError, match="localhost resolves to .*itself"):
        check_names([Host("localhost", 1), Host("192.0.2.1", 1)])
    with pytest.raises(ConfigurationError, match="192.0.2.1 .* same machine"):
        check_names([Host("192.0.2.1", 1), Host("192.0.2.001", 1)])
    check_names([Host("127.0.0.1", 1)])


def test_this_machine_knows_itself():
    own = own_addresses()
    assert own["127.0.0.1"] == "lo"
    assert is_own(Host("localhost", 1), own)
    assert not is_own(Host("192.0.2.1", 1), own)
    assert not is_own(Host("nowhere.invalid", 1), own)

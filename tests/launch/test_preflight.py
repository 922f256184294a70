"""`ten-dist preflight` on hosts that have something wrong with them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.fleet import Fleet, find_program, why_not
from tests.tools.launching import ROOT, launch_environment

NFT = find_program("nft")

pytestmark = pytest.mark.slow
# A program with the behaviour and the output of the real one, for GPUs that a file lists.
_NVIDIA_SMI = """#!{python}
import csv, sys
query, wanted = sys.argv[1].split("=")
assert sys.argv[2] == "--format=csv,noheader,nounits", sys.argv
table = {{"--query-gpu": "gpus", "--query-compute-apps": "processes"}}[query]
for row in csv.DictReader(open(f"{folder}/{{table}}.csv")):
    for name in wanted.split(","):
        if name not in row:
            sys.exit(f'Field "{{name}}" is not a valid field to query.')
    print(", ".join(row[name] for name in wanted.split(",")))
"""
_SERVER = """
import socket
server = socket.create_server(("", 29500))
print("ready", flush=True)
server.accept()
"""
_GPU_HEADER = (
    "index,name,uuid,memory.total,memory.used,temperature.gpu,"
    "ecc.errors.uncorrected.volatile.total,driver_version\n"
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Four hosts; each test leaves them as it found them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Fleet(tmp_path_factory.mktemp("fleet"), 4) as made:
        yield made


@contextlib.contextmanager
def changed(host, mounts=(), **environment):
    """A host that differs from the others, until the block ends."""
    host.start_sshd(mounts, **environment)
    try:
        yield
    finally:
        host.environment.clear()
        host.start_sshd()


def start_preflight(fleet, *options, hosts=None, slots=1, **environment):
    """Start preflight on the first host."""
    listed = hosts or [host.address for host in fleet.hosts[:2]]
    command = [sys.executable, "-m", "ten_dist.cli", "preflight"]
    command += ["--hosts", ",".join(f"{address}:{slots}" for address in listed)]
    command += ["--ssh_config", fleet.ssh_config, "--connect_timeout", 2]
    command += ["--min_free_gigabytes", 0.01, *options]
    return subprocess.Popen(
        fleet.hosts[0].command(command),
        cwd=ROOT,
        env=launch_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def preflight(fleet, *options, expect, **settings):
    """Run preflight on the first host; returns what it printed."""
    process = start_preflight(fleet, *options, **settings)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == expect, output + errors
    return output


class Problems:
    """The problems in a table, to be taken out one by one."""

    def __init__(self, output):
        found = re.findall(
            r"^(error|warning) +(all hosts|\S+) +(.*)$", output, re.MULTILINE
        )
        self.left = [(severity, host, text) for severity, host, text in found]

    def take(self, severity, host, what, cure):
        """Take out the one of a host that says this, and has this cure."""
        for problem in self.left:
            said, _, advice = problem[2].partition(" -> ")
            if problem[:2] == (severity, host) and re.search(what, said):
                assert cure in advice, problem
                self.left.remove(problem)
                return
        raise AssertionError((severity, host, what, self.left))


def python_processes(host):
    """Python programs that run on a host."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "python" in words[0]:
                found.append(words)
    return found


def test_sound_hosts_are_measured(fleet, token_data, tmp_path):
    (tmp_path / "runs").mkdir()
    found = tmp_path / "found.json"
    output = preflight(
        fleet,
        *("--data", token_data, "--output_dir", tmp_path / "runs" / "first"),
        *("--json", found),
        expect=0,
    )
    assert re.search(
        r"all-reduce over gloo, 2 ranks: latency \d+\.\d{3} ms, bus bandwidth "
        r"\d+\.\d{3} GB/s at \d+ MiB",
        output,
    )
    assert "output folder: shared by all hosts" in output
    assert output.endswith("errors: 0, warnings: 0\n")
    figures = json.loads(found.read_text())
    assert figures["interface"] == "eth0" and figures["backend"] == "gloo"
    assert figures["master_address"] == "10.77.0.1"
    assert figures["network"]["latency_seconds"] > 0
    assert figures["network"]["bus_bytes_per_second"] > 0
    assert figures["reports"][1]["python"]["version"] == sys.version.split()[0]
    # Nothing stays: no file, no process.
    assert list((tmp_path / "runs").iterdir()) == []
    assert [python_processes(host) for host in fleet.hosts[:2]] == [[], []]


def test_ranks_get_the_variables_that_training_gets(fleet, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=nowhere0\n")
    output = preflight(fleet, expect=2, HOME=str(tmp_path))
    assert "the all-reduce failed while connecting" in output
    assert "nowhere0" in output
    # What is given counts more than the file.
    words = ["--env", "GLOO_SOCKET_IFNAME=eth0"]
    preflight(fleet, *words, expect=0, HOME=str(tmp_path))


def test_hosts_that_differ_are_named(fleet, token_data, tmp_path):
    old, late, runs = tmp_path / "old", tmp_path / "late", tmp_path / "runs"
    package = old / "torch-2.9.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\n")
    with open(package / "METADATA", "a") as file:
        file.write("Version: 2.9.1\n")
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import time\n_true = time.time\ntime.time = lambda: _true() - 3600\n"
    )
    other = shutil.copytree(token_data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / manifest["shards"][0]["name"]).write_bytes(b"")
    swapped = shutil.copytree(token_data / "val", tmp_path / "swapped")
    errors = tmp_path / "errors.py"
    errors.write_text((ROOT / "ten_dist" / "errors.py").read_text() + "# edited\n")
    runs.mkdir()
    _, second, third, fourth = fleet.hosts
    with (
        changed(second, PYTHONPATH=f"{late}:{old}"),
        changed(
            third,
            [
                ["-t", "tmpfs", "-o", "size=64k", "tmpfs", runs],
                ["--bind", swapped, token_data],
                ["--bind", errors, ROOT / "ten_dist" / "errors.py"],
            ],
        ),
        changed(fourth, [["--bind", other, token_data]]),
    ):
        found = Problems(
            preflight(
                fleet,
                *("--data", token_data, "--output_dir", runs / "first"),
                hosts=[host.address for host in fleet.hosts],
                expect=2,
            )
        )
    found.take(
        "error", second.address, r"its clock is 3,5\d\d\.\d s behind", "timedatectl"
    )
    found.take(
        *("error", second.address, r"^torch is 2\.9\.1, on 10\.77\.0\.1 "),
        "run launch/environment.sh there",
    )
    found.take(
        "error",
        third.address,
        r"has other data \(fingerprint",
        "copy it from 10.77.0.1",
    )
    found.take(
        *("error", third.address, "same commit with other files: ten_dist/errors.py"),
        "git checkout",
    )
    found.take(
        *("error", third.address, "is not the folder that 10.77.0.1 has"),
        "file system that all hosts share",
    )
    found.take(
        *("error", third.address, f"disk of {runs} has only 0.00 GB free"),
        "make room there",
    )
    found.take(
        "error", fourth.address, "has 0 bytes, not", "copy the whole folder there"
    )
    assert found.left == []
    assert list(runs.iterdir()) == []


def test_hosts_that_give_no_report_are_named(fleet, tmp_path):
    stuck, refuses, unplugged, bare = fleet.hosts
    # To read it is to wait for ever, as on a file system whose server has gone.
    os.mkfifo(tmp_path / "manifest.json")
    refuses.stop_sshd()
    unplugged.link("down")
    try:
        with changed(bare, [["-t", "tmpfs", "tmpfs", Path(sys.executable).parent]]):
            output = preflight(
                fleet,
                *("--data", tmp_path, "--report_timeout", 6),
                hosts=[host.address for host in fleet.hosts],
                expect=2,
            )
    finally:
        unplugged.link("up")
        refuses.start_sshd()
    found = Problems(output)
    found.take(
        *("error", stuck.address, "did not get beyond `data`: it took more than 6 s"),
        "--report_timeout",
    )
    found.take(
        *("error", refuses.address, "its ssh server refuses connections"),
        "start sshd there",
    )
    found.take(
        "error", unplugged.address, "ssh gets no answer from it", "is it running"
    )
    found.take(
        *("error", bare.address, f"it has no {sys.executable}"),
        "run launch/environment.sh there",
    )
    assert found.left == []
    assert "all-reduce: not measured, as there are errors" in output


@pytest.fixture
def gpus_of(tmp_path):
    """A function that makes a folder for PATH whose nvidia-smi knows some GPUs."""

    def make(name, gpus, processes=""):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "gpus.csv").write_text(_GPU_HEADER + gpus)
        (folder / "processes.csv").write_text(
            "gpu_uuid,pid,process_name,used_memory\n" + processes
        )
        program = folder / "nvidia-smi"
        program.write_text(_NVIDIA_SMI.format(python=sys.executable, folder=folder))
        program.chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return make


def test_names_ports_and_gpus_are_named(fleet, gpus_of):
    first, second, third, _ = fleet.hosts
    both = "".join(
        f"{n},NVIDIA H100 80GB HBM3,GPU-{n},81559,1,31,0,550.90.07\n" for n in range(2)
    )
    one = "0,NVIDIA H100 80GB HBM3,GPU-9,81559,60000,31,2,550.90.07\n"
    sound, ill = gpus_of("sound", both), gpus_of("ill", one, "GPU-9,77,python,59000\n")
    names = [f"{host.address} {host.name}" for host in fleet.hosts]
    server = subprocess.Popen(
        first.command([sys.executable, "-c", _SERVER]), stdout=subprocess.PIPE
    )
    try:
        assert server.stdout.readline() == b"ready\n"
        second.write_hosts(["127.0.0.1 localhost", "127.0.1.1 node2", *names])
        third.write_hosts(["127.0.0.1 localhost", "127.0.0.1 node1", *names])
        third.ip("link", "set", "eth0", "mtu", "1400")
        with changed(second, PATH=sound), changed(third, PATH=ill):
            hosts = ["node1", second.address, third.address]
            output = preflight(
                fleet,
                *("--backend", "nccl"),
                hosts=hosts,
                slots=2,
                expect=2,
                PATH=sound,
            )
    finally:
        server.kill()
        server.wait()
        third.ip("link", "set", "eth0", "mtu", "1500")
        for host in (second, third):
            host.write_hosts(["127.0.0.1 localhost", *names])
    found = Problems(output)
    found.take(
        *("error", "node1", rf"port 29500, .* \(process {server.pid}, python"),
        "choose another --master_port",
    )
    found.take(
        *("warning", second.address, "its name node2 resolves to 127.0.1.1"),
        "give node2 its address in its /etc/hosts",
    )
    found.take(
        *("error", third.address, "node1 resolves to 127.0.0.1 there"),
        "correct node1 in its /etc/hosts",
    )
    found.take(
        *("warning", third.address, "MTU of its eth0 is 1400, on node1 1500"),
        "ip link set eth0 mtu 1500",
    )
    found.take("error", third.address, "1 GPUs for its 2 slots", "slots=1")
    found.take("error", third.address, "GPU 0 is in use by 77 python", "kill 77")
    found.take("error", third.address, "GPU 0 has had 2 memory errors", "--gpu-reset")
    # The tests run with such a torch, or with one for GPUs.
    assert all("is a build for CPUs" in text for _, _, text in found.left)


@contextlib.contextmanager
def firewall(host, chain, rule):
    """A host whose kernel has a rule, in the chain `input` or `output`."""

    def nft(*words):
        subprocess.run(host.command([NFT, *words]), check=True)

    nft("add", "table", "inet", "test")
    hook = f"{{ type filter hook {chain} priority 0; }}"
    nft("add", "chain", "inet", "test", chain, hook)
    nft("add", "rule", "inet", "test", chain, *rule.split())
    try:
        yield
    finally:
        nft("delete", "table", "inet", "test")


@pytest.mark.skipif(not NFT, reason="there is no nft here")
def test_interfaces_duplicates_and_firewalls_are_named(fleet):
    first, second, third, fourth = fleet.hosts
    for number, host in enumerate((first, second, third), start=1):
        host.add_interface("eth1", f"10.88.0.{number}/24")
    third.link("down", "eth1")
    # The last one is another address of the first.
    hosts = [*(host.address for host in fleet.hosts), "10.88.0.1"]
    with firewall(first, "input", "ip saddr 10.88.0.2 tcp dport 29500 drop"):
        output = preflight(fleet, "--interface", "eth1", hosts=hosts, expect=2)
    found = Problems(output)
    found.take(
        *("error", third.address, "its interface eth1 is down"),
        "ip link set eth1 up",
    )
    found.take(
        *("error", fourth.address, "it has no interface eth1, only eth0, lo"),
        "correct --interface",
    )
    found.take(
        "error", "10.88.0.1", "it is the same machine as 10.77.0.1", "leave one out"
    )
    found.take(
        *("error", second.address, "cannot reach 10.77.0.1 .* port 29500: timed out"),
        "open all TCP ports between the hosts",
    )
    assert found.left == []


@pytest.mark.skipif(not NFT, reason="there is no nft here")
def test_an_all_reduce_that_hangs_ends_everywhere(fleet):
    # Small packets pass, large ones vanish: connecting works and then nothing goes on.
    with firewall(fleet.hosts[1], "output", "tcp sport != 2222 meta length > 900 drop"):
        output = preflight(fleet, "--network_timeout", 20, expect=2)
    found = Problems(output)
    for host in fleet.hosts[:2]:
        found.take(
            *("error", host.address, "did not end in 20 s: it is still reducing 1 MiB"),
            "large packets get lost",
        )
    assert found.left == []
    assert "all-reduce: not measured, it failed" in output
    assert_no_process_is_left(fleet)


def test_a_preflight_that_is_killed_leaves_nothing(fleet):
    process = start_preflight(fleet)
    try:
        deadline = time.monotonic() + 60
        while "reducing" not in process.stdout.readline():
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()
    assert_no_process_is_left(fleet)


def assert_no_process_is_left(fleet):
    deadline = time.monotonic() + 10
    while any(left := [python_processes(host) for host in fleet.hosts]):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

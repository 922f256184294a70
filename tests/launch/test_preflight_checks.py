"""What preflight makes of the reports of hosts."""

import copy

import pytest

from launch.hosts import Host
from launch.preflight.findings import ERROR, WARNING, HostReport, Problem
from launch.preflight.gathering import unreachable
from launch.preflight.gpus import (
    GpuProcess,
    check_gpus,
    chosen_backend,
    parse_devices,
    parse_processes,
)
from launch.preflight.machine import (
    check_clock,
    check_code,
    check_disks,
    check_packages,
    check_python,
)
from launch.preflight.network import check_interfaces, check_names, private_interfaces
from launch.preflight.report import PreflightReport
from launch.preflight.settings import PreflightSettings
from launch.remote import Outcome
from ten_dist.cli import main

# As `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints it.
H100 = "{}, NVIDIA H100 80GB HBM3, GPU-{}, 81559, 1, 31, 0, 550.90.07\n"
PACKAGES = {
    name: "1.0"
    for name in ("deepspeed", "numpy", "webdataset", "ten-dist", "safetensors")
    + ("tokenizers", "fsspec", "tqdm")
} | {"torch": "2.13.0+cu130", "nvidia-nccl-cu13": "2.28.9"}
FACTS = {
    "python": {"version": "3.11.7"},
    "packages": PACKAGES,
    "code": {
        "checkout": True,
        "imported_from": "/opt/ten/ten_dist",
        "commit": "aaaa00000000",
        "files": {"ten_dist/cli.py": "1" * 16, "launch/train.py": "2" * 16},
    },
    "compiler": "c++ (Debian 12.2.0-14) 12.2.0",
    "network": {
        "host_name": "gpu1",
        "names": {},
        "port_problem": None,
        "interfaces": {
            "lo": {"addresses": ["127.0.0.1"], "up": True, "mtu": 65536},
            "eth1": {"addresses": [], "up": True, "mtu": 1500},
        },
        "meeting_port": 29500,
    },
    "gpus": None,
    "temporary": {"path": "/tmp", "total": 1e11, "free": 5e10},
    "shared_memory": {"path": "/dev/shm", "total": 1e11, "free": 5e10},
    "output": {
        "path": "/runs",
        "existing": "/runs",
        "problem": None,
        "total": 1e12,
        "free": 5e11,
    },
    "data": [],
}


def a_report(number, *, clock=0.0, slots=1, **changes):
    """The report of a sound host 10.0.0.N, or of one with changes such as gpus=..."""
    facts = copy.deepcopy(FACTS)
    facts["network"]["interfaces"]["eth1"]["addresses"] = [f"10.0.0.{number}"]
    for name, change in changes.items():
        both_tables = isinstance(facts[name], dict) and isinstance(change, dict)
        facts[name] = {**facts[name], **change} if both_tables else change
    return HostReport(Host(f"10.0.0.{number}", slots), facts, clock)


def gpu_facts(devices, processes="", status=0, errors=""):
    query = {"status": status, "output": devices, "errors": errors}
    return {"devices": query, "processes": processes}


def told(problems):
    """Severity, host and text of problems."""
    return [(p.severity, p.host and p.host.address, p.what) for p in problems]


def gpu_problems(*reports):
    return told(check_gpus(reports, "nccl"))


def test_what_nvidia_smi_prints_is_read():
    (first, second) = parse_devices(
        H100.format(0, "a")
        + "1, NVIDIA GeForce RTX 4090, GPU-b, 24564, 310, 44, [N/A], 550.90.07\n"
    )
    assert (first.index, first.memory_mib, first.ecc_errors) == (0, 81559, 0)
    assert (second.name, second.ecc_errors) == ("NVIDIA GeForce RTX 4090", None)
    assert parse_processes("GPU-a, 4711, python, -c x, 512\n") == [
        GpuProcess("GPU-a", 4711, "python, -c x")
    ]
    assert parse_processes("GPU-a, [N/A], [Not Found], [N/A]\n")[0].pid is None
    with pytest.raises(ValueError):
        parse_devices("No devices were found\n")


def test_sound_gpus_are_no_problem():
    both = H100.format(0, "a") + H100.format(1, "b")
    reports = [a_report(n, slots=2, gpus=gpu_facts(both)) for n in (1, 2)]
    assert gpu_problems(*reports) == []
    assert chosen_backend(reports, "auto", {"DS_ACCELERATOR": "cpu"}) == "gloo"
    assert chosen_backend(reports, "auto", {}) == "nccl"
    assert chosen_backend(reports, "gloo", {}) == "gloo"
    assert chosen_backend([a_report(1)], "auto", {}) == "gloo"


@pytest.mark.parametrize(
    ("gpus", "severity", "what"),
    [
        (None, ERROR, "it has no nvidia-smi, so no GPU for its 2 slots"),
        (gpu_facts(H100.format(0, "a")), ERROR, "it has 1 GPUs for its 2 slots"),
        (gpu_facts("No devices were found\n"), ERROR, "No devices were found"),
        (
            gpu_facts("", status=9, errors="NVIDIA-SMI has failed because it couldn't"),
            ERROR,
            "nvidia-smi fails: NVIDIA-SMI has failed",
        ),
        (
            gpu_facts("".join(H100.format(n, n) for n in range(3))),
            WARNING,
            "only 2 of its 3 GPUs have a slot",
        ),
    ],
)
def test_gpus_that_do_not_match_the_slots_are_named(gpus, severity, what):
    both = gpu_facts(H100.format(0, "a") + H100.format(1, "b"))
    sound = a_report(1, slots=2, gpus=both)
    ((found, host, text),) = gpu_problems(sound, a_report(2, slots=2, gpus=gpus))
    assert (found, host) == (severity, "10.0.0.2")
    assert what in text


def test_ill_and_busy_gpus_are_named():
    devices = (
        "0, NVIDIA H100 80GB HBM3, GPU-a, 81559, 1, 91, 0, 550.90.07\n"
        "1, NVIDIA H100 80GB HBM3, GPU-b, 81559, 1, 31, 3, 550.90.07\n"
        "2, NVIDIA H100 80GB HBM3, GPU-c, 81559, 70000, 31, 0, 550.90.07\n"
        "3, NVIDIA H100 80GB HBM3, GPU-d, 81559, 9000, 31, 0, 550.90.07\n"
    )
    gpus = gpu_facts(devices, "GPU-c, 4711, /usr/bin/python3, 69990\n")
    hot, ecc, busy, unseen = gpu_problems(a_report(1, slots=4, gpus=gpus))
    assert hot == (WARNING, "10.0.0.1", "GPU 0 is at 91 °C before any work")
    assert ecc[0] == ERROR and "GPU 1 has had 3 memory errors" in ecc[2]
    assert busy[0] == ERROR and "GPU 2 is in use by 4711 /usr/bin/python3" in busy[2]
    assert unseen[0] == ERROR and "GPU 3 has 9000 MiB in use" in unseen[2]


def test_other_gpus_and_a_torch_for_cpus_are_named():
    a100 = "0, NVIDIA A100-SXM4-40GB, GPU-z, 40960, 1, 31, 0, 535.54.03\n"
    reports = [
        a_report(1, gpus=gpu_facts(H100.format(0, "a"))),
        a_report(2, gpus=gpu_facts(a100)),
        a_report(
            3,
            gpus=gpu_facts(H100.format(0, "c")),
            packages={"torch": "2.13.0+cpu"},
        ),
    ]
    build, kind, driver = gpu_problems(*reports)
    assert build[:2] == (ERROR, "10.0.0.3") and "build for CPUs" in build[2]
    assert kind[:2] == (WARNING, "10.0.0.2") and "A100-SXM4-40GB of 40960" in kind[2]
    assert driver[:2] == (WARNING, "10.0.0.2") and "535.54.03" in driver[2]


def clock_problems(*offsets):
    reports = [a_report(n, clock=off) for n, off in enumerate(offsets, start=1)]
    return told(check_clock(reports, PreflightSettings()))


def test_a_clock_is_judged_by_those_of_all():
    assert clock_problems(0.3, -0.4, 4.9) == []
    assert clock_problems(0.0, -3600.0) == [
        (ERROR, "10.0.0.2", "its clock is 3,600.0 s behind")
    ]
    ((severity, host, text),) = clock_problems(60.0, 60.1, 60.2)
    assert (severity, host) == (WARNING, None)
    assert text == "the clock of this machine is 60.0 s behind theirs"
    assert clock_problems(60.0)[0][:2] == (ERROR, "10.0.0.1")


def test_versions_are_judged_by_those_of_most():
    reports = [a_report(1), a_report(2), a_report(3, packages={"tqdm": "9"})]
    reports.append(a_report(4, packages={"torch": "2.9.1", "nvidia-nccl-cu13": "2.2"}))
    reports.append(a_report(5, packages={"numpy": "3"}))
    del reports[4].facts["packages"]["webdataset"]
    found = told(check_packages(reports))
    assert found == [
        (ERROR, "10.0.0.5", "its Python lacks webdataset"),
        (ERROR, "10.0.0.4", "nvidia-nccl-cu13 is 2.2, on 10.0.0.1 2.28.9"),
        (ERROR, "10.0.0.4", "torch is 2.9.1, on 10.0.0.1 2.13.0+cu130"),
        (WARNING, "10.0.0.3", "other packages than elsewhere: tqdm 9 (1.0)"),
    ]


def test_pythons_and_compilers_are_compared():
    reports = [
        a_report(1),
        a_report(2, python={"version": "3.9.2"}),
        a_report(3, compiler=None),
        a_report(4, compiler="clang version 18.1.3"),
    ]
    found = told(check_python(reports))
    assert [(severity, host) for severity, host, _ in found] == [
        (ERROR, "10.0.0.2"),
        (ERROR, "10.0.0.2"),
        (ERROR, "10.0.0.3"),
        (WARNING, "10.0.0.4"),
    ]
    assert found[0][2] == "its Python is 3.9.2, too old"


def test_code_is_compared_by_its_contents():
    changed = {"ten_dist/cli.py": "9" * 16, "launch/train.py": "2" * 16}
    reports = [
        a_report(1),
        a_report(2, code={"files": changed}),
        a_report(3, code={"commit": "bbbb00000000"}),
        a_report(4, code={"files": changed, "commit": "cccc00000000"}),
        a_report(5),
        a_report(6, code={"checkout": False}),
        a_report(7, code={"imported_from": None}),
    ]
    found = {host: (severity, text) for severity, host, text in told_of_code(reports)}
    assert found["10.0.0.2"] == (
        ERROR,
        "its code is another: the same commit with other files: ten_dist/cli.py",
    )
    assert found["10.0.0.3"][0] == WARNING
    assert "commit cccc00000000, while 10.0.0.1 has aaaa" in found["10.0.0.4"][1]
    assert found["10.0.0.6"] == (ERROR, "it has no /opt/ten")
    assert found["10.0.0.7"] == (ERROR, "its Python cannot import ten_dist")
    assert len(found) == 5


def told_of_code(reports):
    return told(check_code(reports, "/opt/ten"))


def test_room_is_asked_for():
    settings = PreflightSettings(output_dir="/runs", min_free_gigabytes=100)
    reports = [
        a_report(1),
        a_report(2, output={"free": 9e9}),
        a_report(3, output={"problem": "Read-only file system"}),
        a_report(4, shared_memory={"free": 64e6}, temporary={"free": 1e6}),
    ]
    found = told(check_disks(reports, settings))
    assert found[0] == (
        ERROR,
        "10.0.0.2",
        "the disk of /runs has only 9.00 GB free",
    )
    assert "cannot be written to: Read-only file system" in found[1][2]
    assert [entry[:2] for entry in found[2:]] == [(WARNING, "10.0.0.4")] * 2
    assert "0.06 GB free in /dev/shm" in found[3][2]


def test_the_interface_of_each_host_is_found():
    reports = [a_report(1), a_report(2)]
    lan = {"addresses": ["10.0.0.3"], "up": True, "mtu": 9000}
    reports.append(a_report(3, network={"interfaces": {"ens9": lan}}))
    reports.append(a_report(4, network={"interfaces": {"lo": lan | {"addresses": []}}}))
    names, addresses, problems = private_interfaces(reports, PreflightSettings())
    assert [names.get(report.host) for report in reports] == [
        "eth1",
        "eth1",
        "ens9",
        None,
    ]
    assert addresses[reports[2].host] == "10.0.0.3"
    ((severity, host, text),) = told(problems)
    assert (severity, host) == (ERROR, "10.0.0.4")
    assert text == "none of its interfaces has the address 10.0.0.4"
    found = told(check_interfaces(reports, names, addresses))
    assert [entry[:2] for entry in found] == [(WARNING, "10.0.0.3")] * 2
    assert "MTU of its ens9 is 9000, on 10.0.0.1 1500" in found[1][2]


def test_public_addresses_are_pointed_out():
    reports = [a_report(1), a_report(2)]
    addresses = {reports[0].host: "10.0.0.1", reports[1].host: "8.8.8.8"}
    names = dict.fromkeys(addresses, "eth1")
    found = told(check_interfaces(reports, names, addresses))
    assert found == [(WARNING, "10.0.0.2", "its address 8.8.8.8 is a public one")]


def test_names_are_looked_up_on_every_host():
    right = {"10.0.0.1": ["10.0.0.1"], "10.0.0.2": ["10.0.0.2"]}
    reports = [
        a_report(1, network={"names": right | {"10.0.0.2": ["10.0.0.9"]}}),
        a_report(2, network={"names": right | {"10.0.0.1": []}}),
    ]
    first, second = told(check_names(reports, {}))
    assert first[:2] == (WARNING, "10.0.0.1")
    assert "10.0.0.2 resolves to 10.0.0.9 there, which none" in first[2]
    assert second == (ERROR, "10.0.0.2", "it does not know the name 10.0.0.1")


@pytest.mark.parametrize(
    ("said", "what", "cure"),
    [
        (
            "root@h: Permission denied (publickey).",
            "does not know our key",
            "ssh-copy-id h",
        ),
        (
            "No ED25519 host key is known for h.\nHost key verification failed.",
            "host key",
            "ssh-keygen -R h",
        ),
        (
            "kex_exchange_identification: read: Connection reset by peer",
            "ssh fails: kex_exchange_identification",
            "ssh h true",
        ),
    ],
)
def test_the_way_that_ssh_failed_decides_the_cure(said, what, cure):
    problem = unreachable(Outcome(Host("h", 1), 255, "", said + "\n"))
    assert what in problem.what
    assert cure in problem.cure


def test_the_table_has_hosts_then_errors_then_warnings():
    hosts = [Host("10.0.0.1", 1), Host("10.0.0.2", 1)]
    report = PreflightReport(
        hosts=hosts,
        reports=[a_report(1)],
        problems=[
            Problem(None, "slow", "wait", WARNING),
            Problem(hosts[1], "gone", "bring it back"),
        ],
        backend="gloo",
        interfaces={hosts[0]: "eth1"},
        addresses={hosts[0]: "10.0.0.1"},
        measurement=None,
        no_measurement="as there are errors",
    )
    lines = [" ".join(line.split()) for line in report.table().splitlines()]
    assert "10.0.0.1 1 eth1 1500 +0.0 s aaaa00000000 2.13.0+cu130" in lines[1]
    assert lines[2] == "10.0.0.2 1 no report"
    assert lines[-4:-2] == [
        "error 10.0.0.2 gone -> bring it back",
        "warning all hosts slow -> wait",
    ]
    assert lines[-1] == "errors: 1, warnings: 1"
    assert report.interface is None and report.master_address == "10.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --hostfile"),
        (["--hosts", "a:1", "--hostfile", "x"], "cannot both be given"),
        (["--hostfile", "nowhere"], "--hostfile nowhere cannot be read"),
        (["--hosts", "127.0.0.1:1", "--backend", "mpi"], "--backend must be one of"),
        (["--hosts", "127.0.0.1:1", "--master_port", "0"], "--master_port must be"),
        (["--hosts", "127.0.0.1:1", "--max_clock_skew", "-1"], "--max_clock_skew"),
        (["--hosts", "127.0.0.1:1", "--network_timeout", "0"], "--network_timeout"),
        (["--hosts", "127.0.0.1:1", "--data", "a=b,c"], "NAME=DATA:WEIGHT"),
        (["--hosts", "nowhere.invalid:1,b:1"], "nowhere.invalid does not resolve"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, arguments, message):
    assert main(["preflight", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_one_host_needs_no_ssh(capsys):
    options = ["--hosts", "127.0.0.1:1", "--backend", "gloo"]
    assert main(["preflight", *options, "--min_free_gigabytes", "0"]) == 0
    output = capsys.readouterr().out
    assert "all-reduce: not measured, as one rank has nobody to talk to" in output
    assert "errors: 0" in output

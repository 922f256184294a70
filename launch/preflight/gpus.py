"""GPUs of the hosts: reading what nvidia-smi says, and checking it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from launch.preflight.findings import WARNING, HostReport, Problem, unlike

# A GPU that does nothing has a few hundred MiB in use where its driver keeps state.
_IDLE_MIB = 1024
_HOT = 80


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of a host; None stands for what the device does not tell."""

    index: int
    name: str
    uuid: str
    memory_mib: int | None
    used_mib: int | None
    celsius: int | None
    ecc_errors: int | None
    """Errors of memory since the driver was loaded that could not be corrected."""
    driver: str


@dataclasses.dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU."""

    uuid: str
    """Of the GPU."""
    pid: int | None
    name: str


def parse_devices(text: str) -> list[Gpu]:
    """The GPUs in the CSV of `nvidia-smi` with ``probe.GPU_FIELDS``; else ValueError."""
    found = []
    for index, name, uuid, *numbers, driver in _rows(text):
        memory, used, celsius, ecc = map(_number, numbers)
        gpu = Gpu(int(index), name, uuid, memory, used, celsius, ecc, driver)
        found.append(gpu)
    return found


def parse_processes(text: str) -> list[GpuProcess]:
    """The processes in the CSV of `nvidia-smi --query-compute-apps`; else ValueError."""
    # A process may have a comma in its name.
    return [
        GpuProcess(uuid, _number(pid), ", ".join(name))
        for uuid, pid, *name, _used in _rows(text)
    ]


def devices(report: HostReport) -> list[Gpu]:
    """GPUs of a host; none where it has no nvidia-smi, or one that fails."""
    found = report.section("gpus")
    if found is None or found["devices"]["status"] != 0:
        return []
    try:
        return parse_devices(found["devices"]["output"])
    except ValueError:
        return []


def chosen_backend(
    reports: Sequence[HostReport], backend: str, environment: Mapping[str, str]
) -> str:
    """gloo or nccl: what was asked for, or for `auto` what DeepSpeed will use on all hosts
    with these variables of the ranks."""
    if backend != "auto":
        return backend
    if environment.get("DS_ACCELERATOR") == "cpu":
        return "gloo"
    # One whose nvidia-smi fails was meant to have some.
    return "nccl" if any(report.section("gpus") for report in reports) else "gloo"


def check_gpus(reports: Sequence[HostReport], backend: str) -> Iterator[Problem]:
    """GPUs that are too few, ill, busy or not alike; none of it matters to gloo."""
    if backend != "nccl":
        return
    for report in reports:
        yield from _check_count(report)
        yield from _check_health(report)

    def kind(report: HostReport) -> str | None:
        found = devices(report)
        names = sorted({f"{gpu.name} of {gpu.memory_mib} MiB" for gpu in found})
        return ", ".join(names) or None

    yield from unlike(
        reports,
        kind,
        "its GPUs are {mine}, those of {host} {theirs}",
        "the slowest and smallest one decides for all: use hosts of one type",
        WARNING,
    )
    yield from unlike(
        reports,
        lambda report: ", ".join(sorted({d.driver for d in devices(report)})) or None,
        "its GPU driver is {mine}, that of {host} {theirs}",
        "install the same driver",
        WARNING,
    )


def _check_health(report: HostReport) -> Iterator[Problem]:
    """GPUs that are hot, have errors or are in use, and a torch that cannot use them."""
    processes = []
    try:
        text = (report.section("gpus") or {}).get("processes", "")
        processes = parse_processes(text)
    except ValueError:
        yield report.problem(
            "the list of processes of its nvidia-smi cannot be read",
            "see `nvidia-smi` there for processes that use a GPU",
            WARNING,
        )
    for gpu in devices(report):
        users = [process for process in processes if process.uuid == gpu.uuid]
        yield from _check_device(report, gpu, users)
    version = (report.section("packages") or {}).get("torch", "")
    if version.endswith("+cpu"):
        yield report.problem(
            f"its torch {version} is a build for CPUs",
            "install a build for GPUs there: launch/environment.sh takes the one that "
            "pip finds",
        )


def _check_count(report: HostReport) -> Iterator[Problem]:
    """GPUs that do not match the slots."""
    slots = report.host.slots
    found = report.section("gpus")
    if found is None:
        yield report.problem(
            f"it has no nvidia-smi, so no GPU for its {slots} slots",
            "install the driver there, leave the host out, or say --backend gloo to "
            "train on CPUs",
        )
        return
    query = found["devices"]
    count = len(devices(report))
    if query["status"] != 0 or (query["output"].strip() and not count):
        said = (query["errors"] or query["output"]).strip().splitlines()
        yield report.problem(
            f"nvidia-smi fails: {said[-1] if said else 'it says nothing'}",
            "look at `dmesg` there for NVRM and Xid lines; reload the driver or reboot",
        )
    elif count < slots:
        yield report.problem(
            f"it has {count} GPUs for its {slots} slots",
            f"say slots={count}, or find the missing: `dmesg | grep Xid` there",
        )
    elif count > slots:
        what = f"only {slots} of its {count} GPUs have a slot"
        yield report.problem(what, f"say slots={count} to use all", WARNING)


def _check_device(
    report: HostReport, gpu: Gpu, users: Sequence[GpuProcess]
) -> Iterator[Problem]:
    """A GPU that has errors, is hot or is in use."""
    name = f"GPU {gpu.index}"
    if gpu.ecc_errors:
        yield report.problem(
            f"{name} has had {gpu.ecc_errors} memory errors (ECC) that could not be "
            "corrected",
            f"`nvidia-smi --gpu-reset -i {gpu.index}` there; if they come back, leave "
            "the host out",
        )
    if gpu.celsius is not None and gpu.celsius >= _HOT:
        yield report.problem(
            f"{name} is at {gpu.celsius} °C before any work",
            "see what runs on it and whether it is cooled; a hot one slows down",
            WARNING,
        )
    if users:
        names = ", ".join(f"{user.pid} {user.name}" for user in users)
        pids = " ".join(str(user.pid) for user in users)
        yield report.problem(
            f"{name} is in use by {names}", f"`kill {pids}` there, if nobody needs it"
        )
    elif gpu.used_mib is not None and gpu.used_mib > _IDLE_MIB:
        yield report.problem(
            f"{name} has {gpu.used_mib} MiB in use by no process that can be seen",
            "another container may use it; `fuser -v /dev/nvidia*` on the machine itself "
            "tells",
        )


def _rows(text: str) -> list[list[str]]:
    """Cells of CSV as nvidia-smi writes it, without a header."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [
        [cell.strip() for cell in row]
        for row in csv.reader(lines, skipinitialspace=True, quoting=csv.QUOTE_NONE)
    ]


def _number(cell: str) -> int | None:
    """A number; None for `[N/A]`, `[Not Supported]` and their like."""
    return None if cell.startswith("[") or cell == "ERR!" else int(cell)

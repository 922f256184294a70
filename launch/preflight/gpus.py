"""GPUs of the hosts: reading what nvidia-smi says, and checking it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from launch.preflight.findings import WARNING, HostReport, Problem, differing

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
    """The GPUs in the CSV of `nvidia-smi --query-gpu`, see ``probe.GPU_FIELDS``.

    Raises:
        ValueError: it is something else.
    """
    found = []
    for row in _rows(text):
        index, name, uuid, memory, used, celsius, ecc, driver = row
        found.append(
            Gpu(
                int(index),
                name,
                uuid,
                _number(memory),
                _number(used),
                _number(celsius),
                _number(ecc),
                driver,
            )
        )
    return found


def parse_processes(text: str) -> list[GpuProcess]:
    """The processes in the CSV of `nvidia-smi --query-compute-apps`.

    Raises:
        ValueError: it is something else.
    """
    found = []
    for row in _rows(text):
        uuid, pid, *name, _used = row
        # A process may have a comma in its name.
        found.append(GpuProcess(uuid, _number(pid), ", ".join(name)))
    return found


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
    """gloo or nccl: what was asked for, or for `auto` what DeepSpeed will use.

    Args:
        reports: of all hosts.
        backend: gloo, nccl or auto.
        environment: variables of the ranks.
    """
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
        version = (report.section("packages") or {}).get("torch", "")
        if version.endswith("+cpu"):
            yield Problem(
                report.host,
                f"its torch {version} is a build for CPUs",
                "install a build for GPUs there: launch/environment.sh takes the one "
                "that pip finds",
            )

    def kind(report: HostReport) -> str | None:
        found = devices(report)
        names = sorted({f"{gpu.name} of {gpu.memory_mib} MiB" for gpu in found})
        return ", ".join(names) or None

    for report, typical in differing(reports, kind):
        yield Problem(
            report.host,
            f"its GPUs are {kind(report)}, those of {typical.host} {kind(typical)}",
            "the slowest and smallest one decides for all: use hosts of one type",
            WARNING,
        )

    def driver(report: HostReport) -> str | None:
        return ", ".join(sorted({gpu.driver for gpu in devices(report)})) or None

    for report, typical in differing(reports, driver):
        yield Problem(
            report.host,
            f"its GPU driver is {driver(report)}, that of {typical.host} "
            f"{driver(typical)}",
            "install the same driver",
            WARNING,
        )


def _check_count(report: HostReport) -> Iterator[Problem]:
    """GPUs that do not match the slots."""
    slots = report.host.slots
    found = report.section("gpus")
    if found is None:
        yield Problem(
            report.host,
            f"it has no nvidia-smi, so no GPU for its {slots} slots",
            "install the driver there, leave the host out, or say --backend gloo to "
            "train on CPUs",
        )
        return
    query = found["devices"]
    gpus = devices(report)
    if query["status"] != 0 or (query["output"].strip() and not gpus):
        said = (query["errors"] or query["output"]).strip().splitlines()
        yield Problem(
            report.host,
            f"nvidia-smi fails: {said[-1] if said else 'it says nothing'}",
            "look at `dmesg` there for NVRM and Xid lines; reload the driver or reboot",
        )
    elif len(gpus) < slots:
        yield Problem(
            report.host,
            f"it has {len(gpus)} GPUs for its {slots} slots",
            f"say slots={len(gpus)}, or find the missing: `dmesg | grep Xid` there",
        )
    elif len(gpus) > slots:
        yield Problem(
            report.host,
            f"only {slots} of its {len(gpus)} GPUs have a slot",
            f"say slots={len(gpus)} to use all",
            WARNING,
        )


def _check_health(report: HostReport) -> Iterator[Problem]:
    """GPUs that are hot, have errors or are in use."""
    processes = []
    try:
        text = (report.section("gpus") or {}).get("processes", "")
        processes = parse_processes(text)
    except ValueError:
        yield Problem(
            report.host,
            "the list of processes of its nvidia-smi cannot be read",
            "see `nvidia-smi` there for processes that use a GPU",
            WARNING,
        )
    for gpu in devices(report):
        if gpu.ecc_errors:
            yield Problem(
                report.host,
                f"GPU {gpu.index} has had {gpu.ecc_errors} memory errors (ECC) that "
                "could not be corrected",
                f"`nvidia-smi --gpu-reset -i {gpu.index}` there; if they come back, "
                "leave the host out",
            )
        if gpu.celsius is not None and gpu.celsius >= _HOT:
            yield Problem(
                report.host,
                f"GPU {gpu.index} is at {gpu.celsius} °C before any work",
                "see what runs on it and whether it is cooled; a hot one slows down",
                WARNING,
            )
        users = [found for found in processes if found.uuid == gpu.uuid]
        if users:
            names = ", ".join(f"{user.pid} {user.name}" for user in users)
            pids = " ".join(str(user.pid) for user in users)
            yield Problem(
                report.host,
                f"GPU {gpu.index} is in use by {names}",
                f"`kill {pids}` there, if nobody needs it",
            )
        elif gpu.used_mib is not None and gpu.used_mib > _IDLE_MIB:
            yield Problem(
                report.host,
                f"GPU {gpu.index} has {gpu.used_mib} MiB in use by no process that can "
                "be seen",
                "another container may use it; `fuser -v /dev/nvidia*` on the machine "
                "itself tells",
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

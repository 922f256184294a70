"""Checks of what each host has: clock, disks, data, Python, compiler, code and packages."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence

from launch.preflight.findings import WARNING, HostReport, Problem, differing, unlike
from launch.preflight.settings import PreflightSettings

_LITTLE_ROOM = 1e9
OLDEST_PYTHON = (3, 10)
# Packages that decide what is computed, how ranks talk and what a checkpoint looks like.
_DECISIVE = {
    "torch",
    "deepspeed",
    "triton",
    "numpy",
    "webdataset",
    "ten-dist",
    "safetensors",
    "tokenizers",
    "fsspec",
}
_REQUIRED = _DECISIVE - {"triton"}
_SET_UP = "run launch/environment.sh there"


def check_sections(reports: Sequence[HostReport]) -> Iterator[Problem]:
    """Parts of a report that a host could not give."""
    for report in reports:
        for name, found in report.facts.items():
            if isinstance(found, dict) and "error" in found:
                yield report.problem(
                    f"its report lacks `{name}`: {found['error']}",
                    "mend that there; nothing else is known of it",
                )


def check_clock(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Hosts whose clock is off from that of most, this machine's counting as one."""
    offsets = [0.0, *(report.clock_offset for report in reports)]
    # A single host and this machine have no majority: this machine is right.
    right = 0.0 if len(offsets) == 2 else statistics.median_low(offsets)
    for report in reports:
        ahead = report.clock_offset - right
        if abs(ahead) > settings.max_clock_skew:
            side = "ahead" if ahead > 0 else "behind"
            yield report.problem(
                f"its clock is {abs(ahead):,.1f} s {side}",
                "set it by the network there: `timedatectl set-ntp true`, or `chronyc "
                "makestep`",
            )
    if abs(right) > settings.max_clock_skew:
        side = "ahead of" if right < 0 else "behind"
        yield Problem(
            None,
            f"the clock of this machine is {abs(right):,.1f} s {side} theirs",
            "set it by the network, here: `timedatectl set-ntp true`",
            WARNING,
        )


def check_disks(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Output folders that cannot be written to, and disks without room."""
    for report in reports:
        output = report.section("output")
        if output is not None and output["problem"] is not None:
            yield report.problem(
                f"{output['existing']} cannot be written to: {output['problem']}",
                "mount it, give us the right to write there, make room, or choose "
                "another --output_dir",
            )
        elif output is not None and output["free"] < settings.min_free_gigabytes * 1e9:
            yield report.problem(
                f"the disk of {output['existing']} has only "
                f"{output['free'] / 1e9:.2f} GB free",
                "make room there, choose another --output_dir, or ask for less with "
                "--min_free_gigabytes",
            )
        room = _little_room(report, "temporary", "temporary folder")
        if room is not None:
            cure = "make room there, or set TMPDIR to a folder that has it"
            yield report.problem(room, cure, WARNING)
        room = _little_room(report, "shared_memory", "/dev/shm")
        if room is not None:
            yield report.problem(
                f"{room}, through which its processes talk",
                "mount -o remount,size=8G /dev/shm there; of a container: docker run "
                "--shm-size=8g",
                WARNING,
            )


def _little_room(report: HostReport, section: str, name: str) -> str | None:
    """What to say of a place that is not there or has no room; None of a sound one."""
    room = report.section(section)
    if room is None:
        return f"it has no {name}"
    if room["free"] < _LITTLE_ROOM:
        return f"it has only {room['free'] / 1e9:.2f} GB free in {room['path']}"
    return None


def check_data(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Data that a host cannot read, or that is not the data of most."""
    for number, address in enumerate(settings.data_addresses()):
        for report in reports:
            problem = report.facts["data"][number]["problem"]
            if problem is not None:
                yield report.problem(
                    f"--data {address} cannot be used: {problem}",
                    "open its server to that host, with the same credentials"
                    if "://" in address
                    else "copy the whole folder there, or mount it; `ten-dist data "
                    "verify` checks every byte",
                )

        def fingerprint(report: HostReport, number: int = number) -> str | None:
            return report.facts["data"][number]["fingerprint"]

        shown = address.replace("{", "{{").replace("}", "}}")
        yield from unlike(
            reports,
            fingerprint,
            f"--data {shown} has other data (fingerprint {{mine:.12}}) than on {{host}} "
            "({theirs:.12})",
            "copy it from {host}, or mount the same folder",
        )


def check_python(reports: Sequence[HostReport]) -> Iterator[Problem]:
    """Interpreters that are too old or not the same, and compilers alike."""

    def version(report: HostReport) -> str:
        return report.facts["python"]["version"]

    def minor(report: HostReport) -> str:
        return ".".join(version(report).split(".")[:2])

    for report in reports:
        if tuple(map(int, minor(report).split("."))) < OLDEST_PYTHON:
            yield report.problem(
                f"its Python is {version(report)}, too old",
                f"install 3.10 or newer, then {_SET_UP}",
            )
    for report, typical in differing(reports, minor):
        yield report.problem(
            f"its Python is {version(report)}, that of {typical.host} "
            f"{version(typical)}",
            f"PYTHON=python{minor(typical)} bash launch/environment.sh there",
        )
    for report in reports:
        if report.section("compiler") is None:
            yield report.problem(
                "it has no C++ compiler, with which operators are compiled",
                "apt-get install g++ there, or set CXX",
            )
    yield from unlike(
        reports,
        lambda report: report.section("compiler"),
        "its C++ compiler is `{mine}`, that of {host} `{theirs}`",
        "install the same, unless operators are known to compile with both",
        WARNING,
    )


def check_code(reports: Sequence[HostReport], root: str) -> Iterator[Problem]:
    """Hosts with other code than most, whether committed or not; `root` is the checkout."""
    codes = {report: report.section("code") or {} for report in reports}
    for report, code in codes.items():
        if not code.get("checkout"):
            yield report.problem(f"it has no {root}", "put the same checkout there")
        elif code["imported_from"] is None:
            yield report.problem("its Python cannot import ten_dist", _SET_UP)
    same = [report for report in reports if codes[report].get("imported_from")]
    for report, typical in differing(
        same, lambda report: tuple(sorted(codes[report]["files"].items()))
    ):
        same.remove(report)
        mine, theirs = codes[report], codes[typical]
        names = sorted(mine["files"].keys() | theirs["files"].keys())
        changed = [n for n in names if mine["files"].get(n) != theirs["files"].get(n)]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        place = ""
        if mine["imported_from"] != theirs["imported_from"]:
            place = f", imported from {mine['imported_from']}"
        version = "the same commit with other files"
        if mine["commit"] != theirs["commit"]:
            version = (
                f"commit {mine['commit']}, while {typical.host} has {theirs['commit']}"
            )
        yield report.problem(
            f"its code is another: {version}{place}: {changed[0]}{more}",
            _same_code(root, typical),
        )
    for report, typical in differing(same, lambda report: codes[report]["commit"]):
        yield report.problem(
            f"its commit is {codes[report]['commit']}, that of {typical.host} "
            f"{codes[typical]['commit']}, with the same code",
            _same_code(root, typical),
            WARNING,
        )


def _same_code(root: str, typical: HostReport) -> str:
    """How to give a host the code of another."""
    commit = typical.facts["code"]["commit"]
    if commit is None:
        return f"copy {root} from {typical.host}"
    return f"in {root}: git checkout {commit}, and `git status` as on {typical.host}"


def check_packages(reports: Sequence[HostReport]) -> Iterator[Problem]:
    """Packages that a host lacks or has in another version than most."""
    packages = {report: report.section("packages") or {} for report in reports}

    def version(name: str, report: HostReport) -> str:
        return packages[report].get(name, "missing")

    complete = []
    for report in reports:
        missing = sorted(_REQUIRED - packages[report].keys())
        if missing:
            lacks = f"its Python lacks {', '.join(missing)}"
            yield report.problem(lacks, _SET_UP)
        else:
            complete.append(report)
    minor: dict[HostReport, list[str]] = {}
    for name in sorted({name for report in complete for name in packages[report]}):
        for report, typical in differing(complete, functools.partial(version, name)):
            here, there = version(name, report), version(name, typical)
            if name in _DECISIVE or name.startswith("nvidia-"):
                yield report.problem(
                    f"{name} is {here}, on {typical.host} {there}",
                    f"{_SET_UP}, and see that PYTHONPATH hides nothing",
                )
            else:
                minor.setdefault(report, []).append(f"{name} {here} ({there})")
    for report, names in minor.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield report.problem(
            f"other packages than elsewhere: {', '.join(names[:5])}{more}",
            _SET_UP,
            WARNING,
        )

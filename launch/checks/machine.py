"""Checks of what runs on the hosts: clock, Python, compiler, code, packages, disks, data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from launch.checks.findings import WARNING, HostReport, Problem, differing
from launch.checks.settings import PreflightSettings

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
_SMALL_SHARED_MEMORY = 1e9
_SMALL_TEMPORARY = 1e9
_SET_UP = "run launch/environment.sh there"


def check_sections(reports: Sequence[HostReport]) -> Iterator[Problem]:
    """Parts of a report that a host could not give."""
    for report in reports:
        for name, found in report.facts.items():
            if isinstance(found, dict) and "error" in found:
                yield Problem(
                    report.host,
                    f"its report lacks `{name}`: {found['error']}",
                    "mend that there; nothing else is known of it",
                )


def check_clock(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Hosts whose clock is off from that of most, this machine's counting as one."""
    offsets = [0.0, *(report.clock_offset for report in reports)]
    if len(offsets) == 2:
        right = 0.0
    else:
        right = statistics.median_low(offsets)
    for report in reports:
        ahead = report.clock_offset - right
        if abs(ahead) > settings.max_clock_skew:
            side = "ahead" if ahead > 0 else "behind"
            yield Problem(
                report.host,
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


def check_python(reports: Sequence[HostReport]) -> Iterator[Problem]:
    """Interpreters that are too old or not the same, and compilers alike."""

    def minor(report: HostReport) -> str:
        return ".".join(report.facts["python"]["version"].split(".")[:2])

    for report in reports:
        if tuple(map(int, minor(report).split("."))) < OLDEST_PYTHON:
            yield Problem(
                report.host,
                f"its Python is {report.facts['python']['version']}, too old",
                f"install 3.10 or newer, then {_SET_UP}",
            )
    typical, others = differing(reports, minor)
    for report in others:
        yield Problem(
            report.host,
            f"its Python is {report.facts['python']['version']}, that of {typical.host} "
            f"{typical.facts['python']['version']}",
            f"PYTHON=python{minor(typical)} bash launch/environment.sh there",
        )

    def compiler(report: HostReport) -> str | None:
        return report.section("compiler")

    for report in reports:
        if compiler(report) is None:
            yield Problem(
                report.host,
                "it has no C++ compiler, with which DeepSpeed builds its operators",
                "apt-get install g++ there, or set CXX",
            )
    typical, others = differing(reports, compiler)
    for report in others:
        yield Problem(
            report.host,
            f"its C++ compiler is `{compiler(report)}`, that of {typical.host} "
            f"`{compiler(typical)}`",
            "install the same, unless operators are known to compile with both",
            WARNING,
        )


def check_code(reports: Sequence[HostReport], root: str) -> Iterator[Problem]:
    """Hosts with other code than most, whether committed or not.

    Args:
        reports: of the hosts.
        root: path of the checkout.
    """

    def code(report: HostReport) -> dict:
        return report.section("code") or {}

    for report in reports:
        if not code(report).get("checkout"):
            yield Problem(
                report.host, f"it has no {root}", "put the same checkout there"
            )
        elif code(report)["imported_from"] is None:
            yield Problem(report.host, "its Python cannot import ten_dist", _SET_UP)
    with_code = [report for report in reports if code(report).get("imported_from")]
    typical, others = differing(
        with_code, lambda report: tuple(sorted(code(report)["files"].items()))
    )
    for report in others:
        mine, theirs = code(report)["files"], code(typical)["files"]
        changed = sorted(
            name for name in mine | theirs if mine.get(name) != theirs.get(name)
        )
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        place = ""
        if code(report)["imported_from"] != code(typical)["imported_from"]:
            place = f", imported from {code(report)['imported_from']}"
        version = "the same commit with other files"
        if code(report)["commit"] != code(typical)["commit"]:
            version = (
                f"commit {code(report)['commit']}, while {typical.host} has "
                f"{code(typical)['commit']}"
            )
        yield Problem(
            report.host,
            f"its code is another: {version}{place}: {changed[0]}{more}",
            _same_code(root, typical),
        )
    same = [report for report in with_code if report not in others]
    typical, others = differing(same, lambda report: code(report)["commit"])
    for report in others:
        yield Problem(
            report.host,
            f"its commit is {code(report)['commit']}, that of {typical.host} "
            f"{code(typical)['commit']}, with the same code",
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

    def packages(report: HostReport) -> dict[str, str]:
        return report.section("packages") or {}

    incomplete = []
    for report in reports:
        missing = sorted(_REQUIRED - set(packages(report)))
        if missing:
            incomplete.append(report)
            yield Problem(
                report.host, f"its Python lacks {', '.join(missing)}", _SET_UP
            )
    rest = [report for report in reports if report not in incomplete]
    minor: dict[HostReport, list[str]] = {}
    for name in sorted({name for report in rest for name in packages(report)}):
        typical, others = differing(
            rest, lambda report, name=name: packages(report).get(name, "missing")
        )
        for report in others:
            here = packages(report).get(name, "missing")
            there = packages(typical).get(name, "missing")
            if name in _DECISIVE or name.startswith("nvidia-"):
                yield Problem(
                    report.host,
                    f"{name} is {here}, on {typical.host} {there}",
                    f"{_SET_UP}, and see that PYTHONPATH hides nothing",
                )
            else:
                minor.setdefault(report, []).append(f"{name} {here} ({there})")
    for report, names in minor.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield Problem(
            report.host,
            f"other packages than elsewhere: {', '.join(names[:5])}{more}",
            _SET_UP,
            WARNING,
        )


def check_disks(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Output folders that cannot be written to, and disks without room."""
    for report in reports:
        output = report.section("output")
        if output is not None and output["problem"] is not None:
            yield Problem(
                report.host,
                f"{output['existing']} cannot be written to: {output['problem']}",
                "mount it, give us the right to write there, make room, or choose "
                "another --output_dir",
            )
        elif output is not None and output["free"] < settings.min_free_gigabytes * 1e9:
            yield Problem(
                report.host,
                f"the disk of {output['existing']} has only "
                f"{output['free'] / 1e9:.2f} GB free",
                "make room there, choose another --output_dir, or ask for less with "
                "--min_free_gigabytes",
            )
        temporary = report.section("temporary")
        if temporary is None or temporary["free"] < _SMALL_TEMPORARY:
            found = "no temporary folder"
            if temporary is not None:
                found = f"only {temporary['free'] / 1e9:.2f} GB in {temporary['path']}"
            yield Problem(
                report.host,
                f"it has {found}",
                "make room there, or set TMPDIR to a folder that has it",
                WARNING,
            )
        shared = report.section("shared_memory")
        if shared is None or shared["free"] < _SMALL_SHARED_MEMORY:
            found = "no /dev/shm"
            if shared is not None:
                found = f"only {shared['free'] / 1e9:.2f} GB free in /dev/shm"
            yield Problem(
                report.host,
                f"it has {found}, through which its processes talk",
                "mount -o remount,size=8G /dev/shm there; of a container: docker run "
                "--shm-size=8g",
                WARNING,
            )


def check_data(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """Data that a host cannot read, or that is not the data of most."""
    for number, address in enumerate(settings.data_addresses()):

        def token_set(report: HostReport, number: int = number) -> dict:
            return report.facts["data"][number]

        for report in reports:
            if token_set(report)["problem"] is not None:
                yield Problem(
                    report.host,
                    f"--data {address} cannot be used: {token_set(report)['problem']}",
                    "copy the whole folder there, or mount it; `ten-dist data verify` "
                    "checks every byte",
                )
        typical, others = differing(
            reports, lambda report: token_set(report)["fingerprint"]
        )
        for report in others:
            yield Problem(
                report.host,
                f"--data {address} has other data (fingerprint "
                f"{token_set(report)['fingerprint'][:12]}) than on {typical.host} "
                f"({token_set(typical)['fingerprint'][:12]})",
                f"copy it from {typical.host}, or mount the same folder",
            )

"""Checks of what runs on the hosts: Python, compiler, code and packages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from launch.preflight.findings import WARNING, HostReport, Problem, differing

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
    for report, typical in differing(reports, minor):
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
                "it has no C++ compiler, with which operators are compiled",
                "apt-get install g++ there, or set CXX",
            )
    for report, typical in differing(reports, compiler):
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
    changed_hosts = []
    for report, typical in differing(
        with_code, lambda report: tuple(sorted(code(report)["files"].items()))
    ):
        changed_hosts.append(report)
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
    same = [report for report in with_code if report not in changed_hosts]
    for report, typical in differing(same, lambda report: code(report)["commit"]):
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

    def version(name: str, report: HostReport) -> str:
        return packages(report).get(name, "missing")

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
        for report, typical in differing(rest, functools.partial(version, name)):
            here, there = version(name, report), version(name, typical)
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

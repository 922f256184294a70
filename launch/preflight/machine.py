"""Checks of the clocks, disks and data of the hosts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from launch.preflight.findings import WARNING, HostReport, Problem, differing
from launch.preflight.settings import PreflightSettings

_SMALL_SHARED_MEMORY = 1e9
_SMALL_TEMPORARY = 1e9


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
                    "open its server to that host, with the same credentials"
                    if "://" in address
                    else "copy the whole folder there, or mount it; `ten-dist data "
                    "verify` checks every byte",
                )
        for report, typical in differing(
            reports, lambda report: token_set(report)["fingerprint"]
        ):
            yield Problem(
                report.host,
                f"--data {address} has other data (fingerprint "
                f"{token_set(report)['fingerprint'][:12]}) than on {typical.host} "
                f"({token_set(typical)['fingerprint'][:12]})",
                f"copy it from {typical.host}, or mount the same folder",
            )

"""What a preflight has found, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launch.hosts import Host
from launch.preflight.findings import ERROR, HostReport, NetworkMeasurement, Problem
from launch.preflight.gpus import devices
from launch.table import table


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """The result of a preflight."""

    hosts: Sequence[Host]
    reports: Sequence[HostReport]
    """Of the hosts that could be reached."""
    problems: Sequence[Problem]
    backend: str
    """gloo or nccl, where `auto` was asked for, too."""
    interfaces: Mapping[Host, str]
    """Name of the interface of each host that carries the traffic between them."""
    addresses: Mapping[Host, str]
    """Address of each host on it."""
    measurement: NetworkMeasurement | None
    no_measurement: str
    """Why there is none."""
    shared_output: bool | None = None
    """Whether all hosts see the same output folder; None where that is unknown."""

    @property
    def errors(self) -> list[Problem]:
        """The problems that no run should begin with."""
        return [problem for problem in self.problems if problem.severity == ERROR]

    @property
    def interface(self) -> str | None:
        """The interface with one name on every host; None where there is no such name."""
        names = {self.interfaces.get(host) for host in self.hosts}
        return names.pop() if len(names) == 1 else None

    @property
    def master_address(self) -> str:
        """Address of the first host in the network that joins the hosts."""
        return self.addresses.get(self.hosts[0], self.hosts[0].address)

    def table(self) -> str:
        """A line for each host, one for the network, and one for each problem."""
        heading = ["host", "slots", "interface", "MTU", "clock", "commit", "torch"]
        heading += ["GPUs", "free disk", "shared memory"]
        lines = table([heading, *(self._host_row(host) for host in self.hosts)])
        lines += ["", self.network_line()]
        if self.shared_output is not None:
            shared = "shared" if self.shared_output else "not shared"
            lines.append(f"output folder: {shared} by all hosts")
        if self.problems:
            rows = [
                [p.severity, str(p.host or "all hosts"), f"{p.what} -> {p.cure}"]
                for p in sorted(self.problems, key=lambda problem: problem.severity)
            ]
            lines += ["", *table(rows)]
        warnings = len(self.problems) - len(self.errors)
        lines += ["", f"errors: {len(self.errors)}, warnings: {warnings}"]
        return "\n".join(lines)

    def network_line(self) -> str:
        """The measurement in a line, or why there is none."""
        if self.measurement is None:
            return f"all-reduce: not measured, {self.no_measurement}"
        found = self.measurement
        return (
            f"all-reduce over {found.backend}, {found.ranks} ranks: latency "
            f"{found.latency_seconds * 1e3:.3f} ms, bus bandwidth "
            f"{found.bus_bytes_per_second / 1e9:.3f} GB/s at "
            f"{found.bytes / 2**20:.0f} MiB"
        )

    def _host_row(self, host: Host) -> list[str]:
        report = next((r for r in self.reports if r.host == host), None)
        if report is None:
            return [host.address, str(host.slots), "no report"]
        network = report.section("network") or {}
        interface = self.interfaces.get(host)
        mtu = ((network.get("interfaces") or {}).get(interface) or {}).get("mtu")
        code, packages = report.section("code") or {}, report.section("packages") or {}
        disk = report.section("output") or report.section("temporary")
        return [
            host.address,
            str(host.slots),
            interface or "-",
            str(mtu or "-"),
            f"{report.clock_offset:+.1f} s",
            code.get("commit") or "-",
            packages.get("torch", "-"),
            str(len(devices(report)) or "-"),
            _gigabytes(disk),
            _gigabytes(report.section("shared_memory")),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        problems = self.problems
        return {
            "hosts": [
                {
                    **dataclasses.asdict(host),
                    "interface": self.interfaces.get(host),
                    "private_address": self.addresses.get(host),
                }
                for host in self.hosts
            ],
            "backend": self.backend,
            "interface": self.interface,
            "master_address": self.master_address,
            "shared_output": self.shared_output,
            "network": self.measurement and dataclasses.asdict(self.measurement),
            "problems": [{**vars(p), "host": p.host and str(p.host)} for p in problems],
            "reports": [
                {"host": str(r.host), "clock_offset": r.clock_offset, **r.facts}
                for r in self.reports
            ],
        }


def _gigabytes(space: Mapping[str, Any] | None) -> str:
    return f"{space['free'] / 1e9:.1f} GB" if space else "-"

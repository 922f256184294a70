"""Checks of addresses, interfaces, names and ports of the hosts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.hosts import Host, resolve
from launch.preflight.findings import WARNING, HostReport, Problem, differing, unlike
from launch.preflight.settings import PreflightSettings


def private_interfaces(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> tuple[dict[Host, str], dict[Host, str], list[Problem]]:
    """The interface of each host that carries the traffic between them.

    Returns:
        Names of the interfaces, addresses on them, and what is wrong with those of the
        hosts that are missing in these.
    """
    names: dict[Host, str] = {}
    addresses: dict[Host, str] = {}
    problems = []
    for report in reports:
        interfaces = (report.section("network") or {}).get("interfaces")
        if interfaces is None:
            # Without psutil, which the check of packages reports.
            continue
        found = _private_interface(report, interfaces, settings.interface)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            names[report.host], addresses[report.host] = found
    return names, addresses, problems


def _private_interface(
    report: HostReport, interfaces: Mapping[str, Any], name: str | None
) -> tuple[str, str] | Problem:
    """Name and address of a host's interface, by default that with the host's address."""
    if name is None:
        wanted = resolve(report.host.address)
        for holder, interface in interfaces.items():
            for address in interface["addresses"]:
                if address in wanted:
                    return holder, address
        return report.problem(
            f"none of its interfaces has the address {', '.join(wanted)}",
            "list it with its address in the network that joins the hosts, or name that "
            "network's interface with --interface",
        )
    if name not in interfaces:
        there = ", ".join(sorted(interfaces))
        return report.problem(
            f"it has no interface {name}, only {there}", "correct --interface"
        )
    if not interfaces[name]["up"]:
        return report.problem(
            f"its interface {name} is down",
            f"`ip link set {name} up` there; if it has no carrier, its cable or network",
        )
    if not interfaces[name]["addresses"]:
        return report.problem(
            f"its interface {name} has no address",
            f"`ip address add ADDRESS dev {name}` there",
        )
    return name, interfaces[name]["addresses"][0]


def check_interfaces(
    reports: Sequence[HostReport],
    names: Mapping[Host, str],
    addresses: Mapping[Host, str],
) -> Iterator[Problem]:
    """Interfaces that are not alike, public addresses, and hosts listed twice."""
    if len(reports) < 2:
        return
    known = [report for report in reports if report.host in names]
    yield from unlike(
        known,
        lambda report: names[report.host],
        "the network's interface is {mine} on it, on {host} {theirs}",
        "give both one name, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each "
        "host by itself",
        WARNING,
    )

    def mtu(report: HostReport) -> int:
        interfaces = report.facts["network"]["interfaces"]
        return interfaces[names[report.host]]["mtu"]

    for report, typical in differing(known, mtu):
        yield report.problem(
            f"the MTU of its {names[report.host]} is {mtu(report)}, on {typical.host} "
            f"{mtu(typical)}: large packets may get lost",
            f"`ip link set {names[report.host]} mtu {mtu(typical)}` there",
            WARNING,
        )
    for report in known:
        address = addresses[report.host]
        if ipaddress.ip_address(address).is_global:
            yield report.problem(
                f"its address {address} is a public one",
                "list it with its address in the private network, or name that "
                "network's interface with --interface",
                WARNING,
            )
    for number, report in enumerate(known):
        own = _own_addresses(report)
        for other in known[number + 1 :]:
            if addresses[other.host] in own:
                yield other.problem(
                    f"it is the same machine as {report.host}, which has its address "
                    f"{addresses[other.host]}, too",
                    "leave one out",
                )


def check_names(
    reports: Sequence[HostReport], names: Mapping[Host, str]
) -> Iterator[Problem]:
    """Host names that resolve on a host to something else than they should.

    `names` has the interface of each host that carries the traffic between them.
    """
    if len(reports) < 2:
        return
    addresses = {report.host.address: _own_addresses(report) for report in reports}
    for report in reports:
        network = report.section("network") or {"names": {}, "host_name": ""}
        for name, found in network["names"].items():
            loopback = [a for a in found if ipaddress.ip_address(a).is_loopback]
            if loopback and name in (network["host_name"], report.host.address):
                interface = names.get(report.host, "INTERFACE")
                yield report.problem(
                    f"its name {name} resolves to {loopback[0]} there, so that gloo "
                    "offers the others an address at which they find themselves",
                    f"give {name} its address in its /etc/hosts; until then "
                    f"GLOO_SOCKET_IFNAME={interface} is needed",
                    WARNING,
                )
            elif name not in addresses:
                continue
            elif not found:
                yield report.problem(
                    f"it does not know the name {name}",
                    f"a line `ADDRESS {name}` in its /etc/hosts, or list {name} with "
                    "its address",
                )
            elif loopback:
                yield report.problem(
                    f"{name} resolves to {loopback[0]} there, at which every machine "
                    "finds itself",
                    f"correct {name} in its /etc/hosts, or list {name} with its address",
                )
            elif addresses[name] and addresses[name].isdisjoint(found):
                yield report.problem(
                    f"{name} resolves to {', '.join(found)} there, which none of that "
                    "host's interfaces has",
                    "correct its /etc/hosts or name server, unless it stands for that "
                    "host from outside",
                    WARNING,
                )


def check_master_port(
    reports: Sequence[HostReport], settings: PreflightSettings
) -> Iterator[Problem]:
    """The port at which the ranks meet, if it is taken on the first host."""
    for report in reports:
        problem = (report.section("network") or {}).get("port_problem")
        if problem is not None:
            yield report.problem(
                f"port {settings.master_port}, where the ranks would meet, is not free: "
                f"{problem}",
                "end what has it, a run that is left over perhaps, or choose another "
                "--master_port",
            )


def _own_addresses(report: HostReport) -> set[str]:
    """Addresses of a host's interfaces, loopback left out."""
    interfaces = (report.section("network") or {}).get("interfaces") or {}
    return {
        address
        for interface in interfaces.values()
        for address in interface["addresses"]
        if not ipaddress.ip_address(address).is_loopback
    }

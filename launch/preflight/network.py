"""Checks of addresses, interfaces, names and ports of the hosts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence

from launch.hosts import Host, resolve
from launch.preflight.findings import WARNING, HostReport, Problem, differing
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
        found = (report.section("network") or {}).get("interfaces")
        if found is None:
            # Without psutil, which the check of packages reports.
            continue
        if settings.interface is None:
            wanted = resolve(report.host.address)
            holder = [
                (name, address)
                for name, interface in found.items()
                for address in interface["addresses"]
                if address in wanted
            ]
            if not holder:
                problems.append(
                    Problem(
                        report.host,
                        f"none of its interfaces has the address {', '.join(wanted)}",
                        "list it with its address in the network that joins the hosts, "
                        "or name that network's interface with --interface",
                    )
                )
                continue
            names[report.host], addresses[report.host] = holder[0]
        else:
            name = settings.interface
            interface = found.get(name)
            problem = _unusable(name, interface, found)
            if problem is not None:
                problems.append(Problem(report.host, *problem))
                continue
            names[report.host] = name
            addresses[report.host] = interface["addresses"][0]
    return names, addresses, problems


def _unusable(
    name: str, interface: Mapping | None, found: Mapping
) -> tuple[str, str] | None:
    """What is wrong with an interface, and the cure; None if nothing is."""
    if interface is None:
        there = ", ".join(sorted(found))
        return f"it has no interface {name}, only {there}", "correct --interface"
    if not interface["up"]:
        return (
            f"its interface {name} is down",
            f"`ip link set {name} up` there; if it has no carrier, its cable or network",
        )
    if not interface["addresses"]:
        return (
            f"its interface {name} has no address",
            f"`ip address add ADDRESS dev {name}` there",
        )
    return None


def check_interfaces(
    reports: Sequence[HostReport],
    names: Mapping[Host, str],
    addresses: Mapping[Host, str],
) -> Iterator[Problem]:
    """Interfaces that are not alike, public addresses, and hosts listed twice."""
    if len(reports) < 2:
        return
    known = [report for report in reports if report.host in names]
    for report, typical in differing(known, lambda report: names[report.host]):
        yield Problem(
            report.host,
            f"the network's interface is {names[report.host]} on it, on "
            f"{typical.host} {names[typical.host]}",
            "give both one name, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on "
            "each host by itself",
            WARNING,
        )

    def mtu(report: HostReport) -> int:
        interfaces = report.facts["network"]["interfaces"]
        return interfaces[names[report.host]]["mtu"]

    for report, typical in differing(known, mtu):
        yield Problem(
            report.host,
            f"the MTU of its {names[report.host]} is {mtu(report)}, on {typical.host} "
            f"{mtu(typical)}: large packets may get lost",
            f"`ip link set {names[report.host]} mtu {mtu(typical)}` there",
            WARNING,
        )
    for report in known:
        address = addresses[report.host]
        if ipaddress.ip_address(address).is_global:
            yield Problem(
                report.host,
                f"its address {address} is a public one",
                "list it with its address in the private network, or name that "
                "network's interface with --interface",
                WARNING,
            )
    for number, report in enumerate(known):
        own = _own_addresses(report)
        for other in known[number + 1 :]:
            if addresses[other.host] in own:
                yield Problem(
                    other.host,
                    f"it is the same machine as {report.host}, which has its address "
                    f"{addresses[other.host]}, too",
                    "leave one out",
                )


def check_names(
    reports: Sequence[HostReport], names: Mapping[Host, str]
) -> Iterator[Problem]:
    """Names that resolve on a host to something else than they should.

    Args:
        reports: of the hosts.
        names: the interface of each host that carries the traffic between them.
    """
    if len(reports) < 2:
        return
    addresses = {report.host.address: _own_addresses(report) for report in reports}
    for report in reports:
        network = report.section("network") or {"names": {}, "host_name": ""}
        for name, found in network["names"].items():
            loopback = [a for a in found if ipaddress.ip_address(a).is_loopback]
            own = name in (network["host_name"], report.host.address)
            if own and loopback:
                interface = names.get(report.host, "INTERFACE")
                yield Problem(
                    report.host,
                    f"its name {name} resolves to {loopback[0]} there, so that gloo "
                    "offers the others an address at which they find themselves",
                    f"give {name} its address in its /etc/hosts; until then "
                    f"GLOO_SOCKET_IFNAME={interface} is needed",
                    WARNING,
                )
            elif name not in addresses:
                continue
            elif not found:
                yield Problem(
                    report.host,
                    f"it does not know the name {name}",
                    f"a line `ADDRESS {name}` in its /etc/hosts, or list {name} with "
                    "its address",
                )
            elif loopback:
                yield Problem(
                    report.host,
                    f"{name} resolves to {loopback[0]} there, at which every machine "
                    "finds itself",
                    f"correct {name} in its /etc/hosts, or list {name} with its address",
                )
            elif addresses[name] and addresses[name].isdisjoint(found):
                yield Problem(
                    report.host,
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
            yield Problem(
                report.host,
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

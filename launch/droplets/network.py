"""The private network of a run, and the firewall around its droplets."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from launch.droplets.api import Api
from launch.droplets.errors import NOT_FOUND, ApiError
from launch.droplets.fleet import PREFIX, run_tag
from ten_dist.console import say
from ten_dist.errors import ConfigurationError

_EVERYWHERE = ["0.0.0.0/0", "::/0"]
_PROTOCOLS = ("tcp", "udp", "icmp")
# How the API writes "every port".
_ALL_PORTS = "0"
_SSH_PORT = "22"
_FORBIDDEN = 403
_THERE_ALREADY = (409, 422)


def parse_sources(text: str) -> list[str]:
    """Addresses and networks of a list with commas; ConfigurationError for anything else."""
    sources = [part.strip() for part in text.split(",") if part.strip()]
    for source in sources:
        try:
            ipaddress.ip_network(source, strict=False)
        except ValueError:
            raise ConfigurationError(
                f"--ssh_from {source} is neither an IP address nor a network such as "
                "203.0.113.0/24"
            ) from None
    return sources


def ensure_firewall(
    api: Api, run: str, tags: Sequence[str], ssh_from: Sequence[str]
) -> None:
    """Make the firewall of a run, or have it let in ssh from these addresses and networks.

    It also lets in everything from droplets of the run, and everything out. `tags` are
    those that the droplets will have.
    """
    tag, name = run_tag(run), _name(run)
    # A firewall takes tags that exist only.
    for each in tags:
        api.change(api.client.tags.create, done=_THERE_ALREADY, body={"name": each})
    body = {"name": name, "tags": [tag], **_rules(tag, ssh_from)}
    firewalls = api.client.firewalls
    firewall = api.ensure(
        lambda: next(iter(_firewalls(api, run)), None),
        firewalls.create,
        "firewall",
        body,
        placeholder=body,
    )
    sources = {
        address
        for rule in firewall["inbound_rules"]
        for address in rule["sources"].get("addresses") or []
    }
    if sources != set(ssh_from):
        api.change(firewalls.update, firewall_id=firewall["id"], body=body)


def _rules(tag: str, ssh_from: Sequence[str]) -> dict[str, Any]:
    """The rules of a firewall, as the API takes them."""
    ssh = {
        "protocol": "tcp",
        "ports": _SSH_PORT,
        "sources": {"addresses": list(ssh_from)},
    }
    inside = {"sources": {"tags": [tag]}}
    out = {"destinations": {"addresses": _EVERYWHERE}}
    everything = [{"protocol": name, "ports": _ALL_PORTS} for name in _PROTOCOLS]
    return {
        "inbound_rules": [ssh, *(rule | inside for rule in everything)],
        "outbound_rules": [rule | out for rule in everything],
    }


def ensure_vpc(api: Api, run: str, region: str) -> str:
    """Make the private network of a run in a region unless it is there; its identifier."""
    # With the region in its name: the VPC of a run that was elsewhere may have stayed.
    name = f"{_name(run)}-{region}"
    body = {"name": name, "region": region, "description": f"ten-dist run {run}"}
    vpc = api.ensure(
        lambda: next((v for v in _vpcs(api, run) if v["region"] == region), None),
        api.client.vpcs.create,
        "vpc",
        body,
        placeholder={"id": f"<identifier of the VPC {name}>"},
    )
    return vpc["id"]


def remove_network(api: Api, run: str) -> None:
    """Remove the firewall and the VPCs of a run that has no droplets any more.

    They cost nothing: a VPC that cannot be removed is named, and stays.
    """
    client, gone = api.client, (NOT_FOUND,)
    for firewall in _firewalls(api, run):
        api.change(client.firewalls.delete, done=gone, firewall_id=firewall["id"])
    for vpc in _vpcs(api, run):
        try:
            api.change(client.vpcs.delete, done=gone, vpc_id=vpc["id"])
        except ApiError as error:
            if error.status != _FORBIDDEN:
                raise
            # The first VPC of a region is its default for ever, and one that has just
            # lost its droplets may still count them.
            say(f"the VPC {vpc['name']} stays, which costs nothing: {error}")


def _name(run: str) -> str:
    return f"{PREFIX}-{run}"


def _firewalls(api: Api, run: str) -> list[dict[str, Any]]:
    there = api.pages(api.client.firewalls.list, "firewalls")
    return [firewall for firewall in there if firewall["name"] == _name(run)]


def _vpcs(api: Api, run: str) -> list[dict[str, Any]]:
    there = api.pages(api.client.vpcs.list, "vpcs")
    return [vpc for vpc in there if vpc["name"] == f"{_name(run)}-{vpc['region']}"]

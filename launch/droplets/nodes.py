"""`ten-dist droplets setup`: wait for what droplets do at their first start, and have the
first reach the others over ssh."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.droplets.fleet import Droplet
from launch.droplets.user_data import LOG_FILE, READY_FILE
from launch.hosts import Host
from launch.remote import Outcome, Remote, SshConfig
from ten_dist.console import say
from ten_dist.errors import TrainingError

_SECONDS_FOR_A_SCRIPT = 120
_SECONDS_BETWEEN_ATTEMPTS = 5.0

_WAIT = f"""
if command -v cloud-init >/dev/null; then
  cloud-init status --wait >/dev/null 2>&1
fi
cat "$HOME/{READY_FILE}" 2>/dev/null && exit 0
echo "~/{LOG_FILE} ends with: $(tail -n 1 "$HOME/{LOG_FILE}" 2>&1)" >&2
exit 1
"""
_OWN_KEY = """
set -eu
umask 077
mkdir -p "$HOME/.ssh"
key=$HOME/.ssh/id_ed25519
[ -e "$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$key"
cat "$key.pub"
"""
_ADMIT = """
set -eu
umask 077
mkdir -p "$HOME/.ssh"
keys=$HOME/.ssh/authorized_keys
touch "$keys"
grep -qxF "$1" "$keys" || printf '%s\\n' "$1" >>"$keys"
"""
_KNOW = """
set -eu
umask 077
known=$HOME/.ssh/known_hosts
touch "$known"
for address; do
  ssh-keygen -R "$address" -f "$known" >/dev/null 2>&1 || true
done
ssh-keyscan -T 10 "$@" 2>/dev/null >>"$known"
for address; do
  ssh -n -i "$HOME/.ssh/id_ed25519" -o BatchMode=yes -o ConnectTimeout=10 \\
    -o UserKnownHostsFile="$known" -o StrictHostKeyChecking=yes "$address" true || {
    echo "$address is not reached from here" >&2
    exit 1
  }
done
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FreshSsh(SshConfig):
    """Takes the host keys of new machines, whose addresses others may have had before."""

    known_hosts: str

    def options(self) -> list[str]:
        return [
            *("-o", "StrictHostKeyChecking=accept-new"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}"),
            *super().options(),
        ]


def set_up(droplets: Sequence[Droplet], ssh: SshConfig, wait_minutes: float) -> None:
    """Wait until all droplets are installed, and join them.

    Run again, it does the same without harm.

    Args:
        droplets: the first one is the one that reaches all, itself included, by their
            private addresses.
        ssh: how they are reached from here, by their public addresses.
        wait_minutes: how long to wait for each.

    Raises:
        ConfigurationError: there is no ssh here.
        TrainingError: one is not reached or could not be installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.asdict(ssh)
        # As droplets want it, whoever one is here.
        settings["ssh_user"] = ssh.ssh_user or "root"
        known_hosts = str(Path(folder) / "known_hosts")
        remote = Remote(_FreshSsh(**settings, known_hosts=known_hosts))
        _wait(remote, droplets, wait_minutes * 60)
        hosts = [Host(droplet.addresses[0], 1) for droplet in droplets]
        names = {host: droplet.name for host, droplet in zip(hosts, droplets)}

        def script(where: Sequence[Host], text: str, *words: str) -> list[Outcome]:
            outcomes = remote.run_on_all(
                where,
                ["bash", "-s", "--", *words],
                timeout=_SECONDS_FOR_A_SCRIPT,
                stdin=text.encode(),
            )
            for outcome in outcomes:
                if outcome.status != 0:
                    raise TrainingError(
                        f"{names[outcome.host]} ({outcome.host}) cannot be joined with "
                        f"the others: {outcome.complaint()}"
                    )
            return outcomes

        key = script(hosts[:1], _OWN_KEY)[0].output.strip()
        script(hosts, _ADMIT, key)
        script(hosts[:1], _KNOW, *[droplet.addresses[1] for droplet in droplets])
    say(f"{droplets[0].name} reaches all {len(droplets)} over the private network")


def _wait(remote: Remote, droplets: Sequence[Droplet], seconds: float) -> None:
    """Wait until each has done its first start.

    Raises:
        TrainingError: one is not reached in time, or could not be installed, or they
            have different commits.
    """
    deadline = time.monotonic() + seconds
    by_host = {Host(droplet.addresses[0], 1): droplet for droplet in droplets}

    def wait(host: Host) -> Outcome:
        name, told = by_host[host].name, None
        while True:
            left = max(1.0, deadline - time.monotonic())
            outcome = remote.run(
                host, ["bash", "-s"], timeout=left, stdin=_WAIT.encode()
            )
            if outcome.status == 0:
                say(f"{name} is installed, commit {outcome.output.strip()}")
            if not outcome.unreachable or time.monotonic() >= deadline:
                return outcome
            if outcome.complaint() != told:
                told = outcome.complaint()
                say(f"waiting for {name} ({host}): {told}")
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    outcomes = remote.on_all(list(by_host), wait)
    faults = [
        f"{by_host[outcome.host].name} ({outcome.host}): {outcome.complaint()}"
        for outcome in outcomes
        if outcome.status != 0
    ]
    if faults:
        raise TrainingError(
            f"{len(faults)} of {len(outcomes)} droplets are not installed: "
            f"{'; '.join(faults)}"
        )
    commits = {outcome.output.strip() for outcome in outcomes}
    if len(commits) > 1:
        raise TrainingError(
            f"the droplets have different commits, {', '.join(sorted(commits))}: end "
            "those of the wrong one with `ten-dist droplets down --droplet ID`, and "
            "create them again"
        )

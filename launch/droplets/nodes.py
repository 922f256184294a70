"""`ten-dist droplets setup`: wait for what droplets do at their first start, and have the
first reach the others over ssh."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from launch.droplets.fleet import AMOUNT, Droplet
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
class SetupConfig(SshConfig):
    """Each field is an option of `ten-dist droplets setup`."""

    GROUP: ClassVar[str] = ""

    wait_minutes: Annotated[float, AMOUNT] = 30.0
    """Give up after so many minutes."""


def set_up(droplets: Sequence[Droplet], config: SetupConfig) -> None:
    """Wait until all droplets are installed, and have the first one reach all over ssh.

    It reaches them, itself included, by their private addresses; this machine by their
    public ones. Run again, it does the same without harm.

    Raises:
        ConfigurationError: there is no ssh here.
        TrainingError: one is not reached or could not be installed.
    """
    names = {Host(droplet.addresses[0], 1): droplet.name for droplet in droplets}
    hosts = list(names)
    # As droplets want it, whoever one is here.
    ssh = dataclasses.replace(config, ssh_user=config.ssh_user or "root")
    with tempfile.TemporaryDirectory() as folder:
        remote = Remote(ssh, new_host_keys=f"{folder}/known_hosts")
        _wait(remote, names, config.wait_minutes * 60)

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


def _wait(remote: Remote, names: Mapping[Host, str], seconds: float) -> None:
    """Wait until each host, a droplet with a name, has done its first start."""
    deadline = time.monotonic() + seconds

    def wait(host: Host) -> Outcome:
        told = None
        while True:
            left = max(1.0, deadline - time.monotonic())
            outcome = remote.run(
                host, ["bash", "-s"], timeout=left, stdin=_WAIT.encode()
            )
            if outcome.status == 0:
                say(f"{names[host]} is installed, commit {outcome.output.strip()}")
            if not outcome.unreachable or time.monotonic() >= deadline:
                return outcome
            if outcome.complaint() != told:
                told = outcome.complaint()
                say(f"waiting for {names[host]} ({host}): {told}")
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    outcomes = remote.on_all(list(names), wait)
    faults = [
        f"{names[outcome.host]} ({outcome.host}): {outcome.complaint()}"
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

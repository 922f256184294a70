"""What a droplet does at its first start."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from ten_dist.errors import ConfigurationError

_SCRIPT = Path(__file__).with_name("user_data.sh")
_CHECKOUT = Path(__file__).resolve().parents[2]
READY_FILE = ".ten-dist/ready"
"""In the home folder of a droplet: the commit that is installed, once all is."""
LOG_FILE = ".ten-dist/setup.log"
"""In the home folder of a droplet: what the script has printed."""


def user_data(repository: str, commit: str, pip_index: str | None = None) -> str:
    """The script that cloud-init runs: packages, scratch disks, checkout, environment.

    It clones the URL `repository`, checks out a commit or tag, and has pip take packages
    from the URL `pip_index`, too.

    Raises:
        ConfigurationError: a URL holds a password, which every program on a droplet
            could read; or one of them is no such thing.
    """
    for name, url in (("repository", repository), ("pip_index", pip_index or "")):
        _check_url(name, url)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", commit):
        raise ConfigurationError(f"--commit {commit!r} is not a commit or tag")
    lines = ["#!/usr/bin/env bash"]
    lines += [f"repository={shlex.quote(repository)}", f"commit={shlex.quote(commit)}"]
    if pip_index:
        lines += [f"export PIP_EXTRA_INDEX_URL={shlex.quote(pip_index)}"]
    return "\n".join([*lines, _SCRIPT.read_text(encoding="utf-8")])


def _check_url(name: str, url: str) -> None:
    """Raise ConfigurationError for a URL with a password, or what git takes for an option."""
    parts = urlsplit(url)
    if parts.password or (parts.scheme.startswith("http") and parts.username):
        raise ConfigurationError(
            f"--{name} must not hold a user or password: every program on a droplet can "
            "read what it was started with"
        )
    if url.startswith("-"):
        raise ConfigurationError(f"--{name} {url} is not a URL")


def own_commit() -> str:
    """The commit of this checkout; ConfigurationError where this is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        raise ConfigurationError(
            "this is no git checkout whose commit the droplets could have: give --commit"
        ) from None
    return done.stdout.strip()

"""Whether a run folder may be continued by these options."""

from __future__ import annotations

from typing import Any

from ten_dist.errors import ConfigurationError
from ten_dist.run_folder import RunFolder


def check_same_run(folder: RunFolder, identity: dict[str, Any], resume: str) -> int:
    """Which start of the run this is, 1 for the first.

    Args:
        folder: where the run is or will be.
        identity: option names and values that make it the run it is.
        resume: the option of that name.

    Raises:
        ConfigurationError: the folder holds a run that `resume` does not allow to
            continue, or one with other options.
    """
    if not folder.exists():
        return 1
    if resume == "never":
        raise ConfigurationError(
            f"--output_dir {folder.path} already holds a run and --resume is never: "
            "choose another folder, or remove this one"
        )
    config = folder.read_config()
    changed = describe_changes(config["identity"], identity)
    if changed:
        raise ConfigurationError(
            f"--output_dir {folder.path} holds a run with other options: {changed}: "
            "give the same ones, or choose another folder"
        )
    return config["attempts"] + 1


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Options that differ, in words; empty where none does."""
    return "; ".join(
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )

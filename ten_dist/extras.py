"""Packages that only some need: whether they are there, and which extra brings them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ten_dist.errors import ConfigurationError


def require_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """Refuse to begin what needs packages that are not there.

    Args:
        what: needs them, as messages begin.
        packages: by the names of their modules.
        extra: of ten_dist, which brings all of them.

    Raises:
        ConfigurationError: at least one is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{what} needs packages that are not installed, {', '.join(missing)}: "
            f"pip install 'ten_dist[{extra}]'"
        )

"""What a preflight checks, and how strict it is."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path

from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.errors import ConfigurationError

DEFAULT_PORT = 29500
BACKENDS = ("auto", "gloo", "nccl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightSettings:
    """Each field is an option of `ten-dist preflight`."""

    data: str | None = None
    """Data of the run, as `ten-dist train` takes it: every host must have the same."""
    output_dir: str | None = None
    """Folder of the run: every host must be able to write to it and see what others
    write."""
    interface: str | None = None
    """Network interface that carries the traffic between the hosts, where it is not the
    one with the address that the host is listed with."""
    master_port: int = DEFAULT_PORT
    """Port of the first host at which the ranks will meet."""
    backend: str = "auto"
    """What the ranks will talk over: gloo, nccl, or auto for nccl where hosts have GPUs
    and DS_ACCELERATOR is not cpu."""
    python: str = sys.executable
    """Interpreter on the hosts."""
    max_clock_skew: float = 5.0
    """Seconds that the clock of a host may be off."""
    min_free_gigabytes: float = 10.0
    """Free disk space wanted for the output folder."""
    network_test: bool = True
    """Whether to measure an all-reduce across the hosts."""
    report_timeout: int = 60
    """Seconds that a host has to report what it is and has."""
    network_timeout: int = 120
    """Seconds that the all-reduce may take, starting Python and torch included."""

    def __post_init__(self) -> None:
        if not 0 < self.master_port < 65536:
            raise ConfigurationError(
                f"--master_port must be from 1 to 65535, not {self.master_port}"
            )
        if self.backend not in BACKENDS:
            raise ConfigurationError(
                f"--backend must be one of {', '.join(BACKENDS)}, not {self.backend}"
            )
        for name in ("max_clock_skew", "min_free_gigabytes"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"--{name} must be 0 or more, not {value}")
        for name in ("report_timeout", "network_timeout"):
            if not 1 <= getattr(self, name) <= LONGEST_SECONDS:
                raise ConfigurationError(
                    f"--{name} must be from 1 to {LONGEST_SECONDS:,.0f}, "
                    f"not {getattr(self, name)}"
                )

    def data_addresses(self) -> list[str]:
        """Folders, whole, and URLs of the token sets that `data` names.

        Raises:
            ConfigurationError: it is not what `ten-dist train` takes.
        """
        if self.data is None:
            return []
        # Imports torch, which takes seconds.
        from ten_dist.data import is_url, parse_mixture

        mixture = parse_mixture(self.data)
        addresses = [s.address for s in mixture] if mixture else [self.data]
        return [a if is_url(a) else os.path.abspath(a) for a in addresses]

    def output_path(self) -> Path | None:
        """`output_dir`, whole: a host has another current folder."""
        return None if self.output_dir is None else Path(self.output_dir).absolute()

"""What a preflight checks, and how strict it is."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import PORT, Options, at_least, metavar

DEFAULT_PORT = 29500


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightSettings(Options):
    """Each field is an option of `ten-dist preflight`."""

    GROUP: ClassVar[str] = "checks"

    data: Annotated[str | None, metavar("DATA")] = None
    """Data of the run, as `ten-dist train` takes it: every host must have the same."""
    output_dir: Annotated[str | None, metavar("DIR")] = None
    """Folder of the run: every host must be able to write to it and see what others
    write."""
    interface: str | None = None
    """Network interface that carries the traffic between the hosts, where it is not the
    one with the address that the host is listed with."""
    master_port: Annotated[int, PORT] = DEFAULT_PORT
    """Port of the first host at which the ranks will meet."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What the ranks will talk over: gloo, nccl, or auto for nccl where hosts have GPUs
    and DS_ACCELERATOR is not cpu."""
    python: Annotated[str, metavar("PATH")] = sys.executable
    """Interpreter on the hosts."""
    max_clock_skew: Annotated[float, at_least(0)] = 5.0
    """Seconds that the clock of a host may be off."""
    min_free_gigabytes: Annotated[float, at_least(0)] = 10.0
    """Free disk space wanted for the output folder."""
    network_test: bool = True
    """Whether to measure an all-reduce across the hosts."""
    report_timeout: Annotated[int, at_least(1, most=LONGEST_SECONDS)] = 60
    """Seconds that a host has to report what it is and has."""
    network_timeout: Annotated[int, at_least(1, most=LONGEST_SECONDS)] = 120
    """Seconds that the all-reduce may take, starting Python and torch included."""

    def data_addresses(self) -> list[str]:
        """Absolute folders and URLs of the token sets in `data`; ConfigurationError where
        it is not what `ten-dist train` takes."""
        if self.data is None:
            return []
        # Imports torch, which takes seconds.
        from ten_dist.data import is_url, parse_mixture

        mixture = parse_mixture(self.data)
        addresses = [s.address for s in mixture] if mixture else [self.data]
        return [a if is_url(a) else os.path.abspath(a) for a in addresses]

    def output_path(self) -> Path | None:
        """`output_dir`, absolute: a host has another current folder."""
        return None if self.output_dir is None else Path(self.output_dir).absolute()

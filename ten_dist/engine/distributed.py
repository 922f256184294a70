"""The ranks of a run: how they find each other, agree and part."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

from ten_dist.console import complain
from ten_dist.engine.deepspeed_internals import leave_out_shared_memory_operator
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.own_rank import OwnRank, take_part

# The name of a node that was started just now may not be known everywhere yet.
_SECONDS_FOR_NAMES = 60


def _rendezvous(own: OwnRank) -> dict[str, str]:
    """Environment that torch needs to connect the ranks, where no launcher set it.

    Without any launcher this is a run of one process; DeepSpeed would look for MPI
    then, and fail where there is none.
    """
    wanted = {
        "RANK": str(own.rank),
        "WORLD_SIZE": str(own.world_size),
        "LOCAL_RANK": str(own.local_rank),
    }
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if own.world_size == 1 and not all(map(os.environ.get, names)):
        # Those that are set were left by something else.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return wanted | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise ConfigurationError(
            "MASTER_ADDR and MASTER_PORT are not set: export the address of the first "
            "node and a free port on it"
        )
    _check_master(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    return wanted


def _check_master(address: str, port: str) -> None:
    """Refuse an address that cannot exist, for which torch would wait.

    Raises:
        ConfigurationError: the port is no port, or the address cannot be resolved.
    """
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigurationError(
            f"MASTER_PORT is '{port}', and must be a port from 1 to 65535: give the "
            "launcher another --master_port"
        )
    end = time.monotonic() + _SECONDS_FOR_NAMES
    while True:
        try:
            socket.getaddrinfo(address, int(port))
            return
        # A name with an empty or too long part cannot even be asked for.
        except (OSError, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN
            if again and time.monotonic() < end:
                time.sleep(1)
                continue
            raise ConfigurationError(
                f"MASTER_ADDR is '{address}', which is no address that this machine "
                f"knows ({error}): give the launcher another --master_addr"
            ) from None


def _connect(timeout: datetime.timedelta) -> None:
    """Make the first process group, and say what to change where that fails.

    Raises:
        ConfigurationError: another program has the port.
        TrainingError: not all ranks came, or the network fails.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        deepspeed.init_distributed(verbose=False, timeout=timeout)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigurationError(
                f"port {port} is in use by another program: give the launcher another "
                "--master_port, or end that program"
            ) from None
        raise TrainingError(
            f"the ranks do not meet at {address}:{port}: {str(error).splitlines()[0]}; "
            "see that all were started, with the same MASTER_ADDR and MASTER_PORT, and "
            "that the port is open"
        ) from None


class Channel:
    """Exchanges small Python objects between all ranks, over the host's network.

    Each has a gloo process group of its own, whatever backend tensors use, so that calls
    on one may come from another thread than calls on another.
    """

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """The values that all ranks give, by rank, on every rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 gives, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def largest(self, value: float) -> float:
        """Largest of a number over the ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.item()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)


class Ranks(Channel):
    """All ranks of a run, connected.

    Args:
        timeout: least seconds that a rank waits for another in any process group, where
            DEEPSPEED_TIMEOUT does not say more.

    Attributes:
        timeout: that of its process groups.
        rank, world_size: of this process and in all.
        local_world_size: ranks on this machine.
        device: where this rank computes.
        background: for the thread that writes checkpoints, and for no other.
    """

    def __init__(self, timeout: float = 0.0) -> None:
        self.timeout = max(default_pg_timeout, datetime.timedelta(seconds=timeout))
        own = take_part()
        self.rank, self.world_size = own.rank, own.world_size
        self.local_world_size = own.local_world_size
        os.environ.update(_rendezvous(own))
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = torch.device(get_accelerator().device_name(own.local_rank))
        get_accelerator().set_device(own.local_rank)
        leave_out_shared_memory_operator()
        _connect(self.timeout)
        super().__init__(self.timeout)
        self.background = Channel(self.timeout)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Fail on every rank where the block fails on any, so that none waits for it.

        The block must not communicate: a rank that failed would be waited for.

        Raises:
            ConfigurationError: the first error by rank, the same on all ranks, was one.
            TrainingError: it was another.
        """
        own, cause = None, None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, others must know
            cause = error
            refused = isinstance(error, ConfigurationError)
            expected = isinstance(error, (ConfigurationError, TrainingError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            own = (ConfigurationError if refused else TrainingError, text)
        for rank, failure in enumerate(self.gather(own)):
            if failure is not None:
                kind, text = failure
                agreed = kind(text if rank == 0 else f"rank {rank}: {text}")
                # Said before any rank ends: the launcher kills the others of a machine
                # as soon as one has, perhaps the one that would say it.
                complain(str(agreed))
                agreed.reported = True
                self.barrier()
                raise agreed from cause

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Wait until all ranks have done their work; only where all ranks do.

        The groups are kept for the life of the process: DeepSpeed holds on to them, and
        destroying one whose peers may already have ended can abort the process.
        """
        self.barrier()

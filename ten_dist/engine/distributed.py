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
from torch.distributed import distributed_c10d

from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.monitor.console import complain

# Set by launchers that leave it to the program to find its rank.
_OTHER_LAUNCHERS = ("SLURM_NTASKS", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# The name of a node that was started just now may not be known everywhere yet.
_SECONDS_FOR_NAMES = 60


def describe_ranks() -> tuple[int, int]:
    """Rank and number of ranks, as the launcher set them; (0, 1) without a launcher."""
    return (
        int(_launcher_variable("RANK", "0")),
        int(_launcher_variable("WORLD_SIZE", "1")),
    )


def _launcher_variable(name: str, default: str) -> str:
    # OpenMPI names its ranks in variables of its own.
    mpi_name = f"OMPI_COMM_WORLD_{name.removeprefix('WORLD_')}"
    return os.environ.get(name) or os.environ.get(mpi_name) or default


def _rendezvous() -> dict[str, str]:
    """Environment that torch needs to connect the ranks, where no launcher set it.

    Without any launcher this is a run of one process; DeepSpeed would look for MPI
    then, and fail where there is none.
    """
    _, world_size = describe_ranks()
    for name in _OTHER_LAUNCHERS:
        if world_size == 1 and int(os.environ.get(name) or 1) > 1:
            raise ConfigurationError(
                f"{name} is {os.environ[name]}, but neither WORLD_SIZE nor RANK is set: "
                "each process would train by itself. Start with the deepspeed launcher, "
                "torchrun or mpiexec of Open MPI, or export both for each process"
            )
    wanted = {
        "RANK": _launcher_variable("RANK", "0"),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": _launcher_variable("LOCAL_RANK", "0"),
    }
    if world_size == 1:
        wanted |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigurationError(
            "MASTER_ADDR and MASTER_PORT are not set: export the address of the first "
            "node and a free port on it"
        )
    else:
        _check_master(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _check_master(address: str, port: str) -> None:
    """Refuse a place to meet that there cannot be, for which torch would wait.

    Raises:
        ConfigurationError: the port is none, or the address is not known.
    """
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
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


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Say what to change where the ranks cannot connect.

    Raises:
        ConfigurationError: another program has the port.
        TrainingError: not all ranks came, or the network fails.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        yield
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigurationError(
                f"port {os.environ['MASTER_PORT']} is in use by another program: give "
                "the launcher another --master_port, or end that program"
            ) from None
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"the ranks do not meet at {place}: {reason}; see that all were started, "
            "with the same MASTER_ADDR and MASTER_PORT, and that the port is open"
        ) from None


@contextlib.contextmanager
def _without_variable(name: str) -> Iterator[None]:
    """Hide an environment variable from a block.

    Where DeepSpeed finds LOCAL_SIZE it makes buffers for inference in shared memory, 64
    MiB a rank that no training uses and nobody removes: memory lost with every start.
    """
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ObjectChannel:
    """Small Python objects between ranks, over the host's network.

    Each is a process group of its own, whatever tensors go over: calls on one may come
    from another thread than those on the next.
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


class Ranks:
    """All ranks of a run, connected.

    Args:
        patience: least seconds that a rank waits for another in any group, where
            DEEPSPEED_TIMEOUT does not say more.

    Attributes:
        rank, world_size: of this process and in all.
        local_world_size: ranks on this machine.
        device: where this rank computes.
        background: for the thread that writes checkpoints, and for no other.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self._timeout = max(default_pg_timeout, datetime.timedelta(seconds=patience))
        self.rank, self.world_size = describe_ranks()
        os.environ.update(_rendezvous())
        local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world_size = int(
            os.environ.get("LOCAL_SIZE")
            or os.environ.get("LOCAL_WORLD_SIZE")
            or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
            or "1"
        )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = torch.device(get_accelerator().device_name(local_rank))
        get_accelerator().set_device(local_rank)
        with _meeting(), _without_variable("LOCAL_SIZE"):
            deepspeed.init_distributed(verbose=False, timeout=self._timeout)
        self._words = ObjectChannel(self._timeout)
        self.background = ObjectChannel(self._timeout)

    def be_patient(self) -> None:
        """Give the groups that DeepSpeed has made the timeout of the first one.

        They have torch's own, 10 minutes with NCCL: shorter than a slow start takes,
        and an end without a report.
        """
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(self._timeout, group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    def agree(self, error: Exception | None) -> None:
        """Fail on every rank where any rank has failed, so that none waits for it.

        Raises:
            ConfigurationError: the first error by rank, the same on all ranks, was one.
            TrainingError: it was another.
        """
        mine: tuple[type, str] | None = None
        if error is not None:
            refused = isinstance(error, ConfigurationError)
            kind = ConfigurationError if refused else TrainingError
            expected = isinstance(error, (ConfigurationError, TrainingError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            mine = (kind, text)
        for rank, failure in enumerate(self.gather(mine)):
            if failure is not None:
                kind, text = failure
                agreed = kind(text if rank == 0 else f"rank {rank}: {text}")
                # Said before any rank ends: the launcher kills the others of a machine
                # as soon as one has, perhaps the one that would say it.
                complain(str(agreed))
                agreed.reported = True
                self.barrier()
                raise agreed from error

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run a block that may fail on some ranks; see :meth:`agree`.

        The block must not communicate: a rank that failed would be waited for.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, others must know
            failure = error
        self.agree(failure)

    def gather(self, value: Any) -> list[Any]:
        """The values that all ranks give, by rank, on every rank."""
        return self._words.gather(value)

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 gives, on every rank."""
        return self._words.from_first(value)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """Largest of a number over the ranks."""
        return self._words.largest(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._words.barrier()

    def close(self) -> None:
        """Wait until all ranks have done their work; only where all ranks do.

        The groups are kept for the life of the process: DeepSpeed holds on to them, and
        destroying one whose peers may already have ended can abort the process.
        """
        self.barrier()

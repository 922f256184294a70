"""Which rank this process is, as its launcher says in environment variables.

Only a training has ranks. Other commands never look: a variable that a shell, a container
or a scheduler has left must not make them silent.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from ten_dist.errors import ConfigurationError


@dataclasses.dataclass(frozen=True)
class OwnRank:
    """This process among those of a training."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_world_size: int = 1
    """Ranks of this machine."""


# Of the deepspeed launcher and of torchrun, which name the last differently; of Open MPI.
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_TORCHRUN = (*_TORCH[:-1], "LOCAL_WORLD_SIZE")
_OPEN_MPI = tuple(
    f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
)
VARIABLES = (*_TORCH, _TORCHRUN[-1], *_OPEN_MPI)
"""All that say which rank a process is."""
# Set by launchers that leave it to the program to find its rank, or that another one of
# theirs has been given precedence over.
_OTHER_SIZES = (_OPEN_MPI[1], "SLURM_NTASKS", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_own = OwnRank()


def own_rank() -> OwnRank:
    """This process; one alone until :func:`take_part`."""
    return _own


def take_part() -> OwnRank:
    """Take the rank of this process from its environment.

    Raises:
        ConfigurationError: the variables contradict each other, or are no numbers.
    """
    global _own
    _own = rank_of_environment(os.environ)
    return _own


def rank_of_environment(environment: Mapping[str, str]) -> OwnRank:
    """The rank that variables describe; one process alone without a launcher's.

    An empty variable is one that is not set.

    Raises:
        ConfigurationError: they contradict each other, or are no numbers.
    """
    torch = _TORCH if environment.get(_TORCH[-1]) else _TORCHRUN
    launched = (
        names
        for names in (torch, _OPEN_MPI)
        if environment.get(names[0]) and environment.get(names[1])
    )
    names = next(launched, ())
    rank_name, size_name, local_name, _ = names or torch
    own = OwnRank(
        *(
            read_number(environment, name, default)
            for name, default in zip(names or torch, (0, 1, 0, 1), strict=True)
        )
    )
    if own.world_size > 1 and not names:
        raise ConfigurationError(
            f"{size_name} is {own.world_size}, but {rank_name} is not set: unset "
            f"{size_name} to train in one process, or start with a launcher"
        )
    for name, value in ((rank_name, own.rank), (local_name, own.local_rank)):
        if value >= own.world_size:
            raise ConfigurationError(
                f"{name} is {value}, but {size_name} is {own.world_size}: unset "
                f"{name} to train in one process, or start with a launcher"
            )
    for name in _OTHER_SIZES if own.world_size == 1 else ():
        if read_number(environment, name, 1) > 1:
            raise ConfigurationError(
                f"{name} is {environment[name]}, but WORLD_SIZE and RANK do not say so: "
                "each process would train by itself. Start with the deepspeed launcher, "
                "torchrun or mpiexec of Open MPI, or export both for each process"
            )
    return own


def likely_rank(environment: Mapping[str, str]) -> OwnRank:
    """As :func:`rank_of_environment`; one process alone where variables are wrong."""
    try:
        return rank_of_environment(environment)
    except ConfigurationError:
        return OwnRank()


def without_stray_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a program that may start ranks, without variables that make no
    rank of several: every process that inherits them would be taken for a rank."""
    if likely_rank(environment).world_size > 1:
        return dict(environment)
    return {name: environment[name] for name in environment if name not in VARIABLES}


def read_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable that counts something; an empty one is not set.

    Raises:
        ConfigurationError: it is no whole number, or less than 0.
    """
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"the environment variable {name} is {text!r}, where a whole number belongs: "
            "correct it, or unset it"
        )
    return int(text)

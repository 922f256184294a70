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


@dataclasses.dataclass(frozen=True)
class _Names:
    """The variables of a kind of launcher."""

    rank: str
    world_size: str
    local_rank: str
    local_world_sizes: tuple[str, ...]

    def are_set(self, environment: Mapping[str, str]) -> bool:
        return bool(environment.get(self.rank) and environment.get(self.world_size))


_TORCH = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
# Set by launchers that leave it to the program to find its rank, or that another one of
# theirs has been given precedence over.
_OTHER_LAUNCHERS = (
    _OPEN_MPI.world_size,
    "SLURM_NTASKS",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
VARIABLES = tuple(
    name
    for names in (_TORCH, _OPEN_MPI)
    for name in (
        names.rank,
        names.world_size,
        names.local_rank,
        *names.local_world_sizes,
    )
)
"""All that say which rank a process is."""

_own = OwnRank()


def own_rank() -> OwnRank:
    """This process; one alone until :func:`take_part`."""
    return _own


def take_part() -> OwnRank:
    """Be the rank that the environment says, from now on.

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
    names = next((n for n in (_TORCH, _OPEN_MPI) if n.are_set(environment)), _TORCH)
    own = OwnRank(
        read_number(environment, names.rank, 0),
        read_number(environment, names.world_size, 1),
        read_number(environment, names.local_rank, 0),
        next(
            (
                read_number(environment, name, 1)
                for name in names.local_world_sizes
                if environment.get(name)
            ),
            1,
        ),
    )
    if own.world_size > 1 and not names.are_set(environment):
        raise ConfigurationError(
            f"{names.world_size} is {own.world_size}, but {names.rank} is not set: unset "
            f"{names.world_size} to train in one process, or start with a launcher"
        )
    for name, value in ((names.rank, own.rank), (names.local_rank, own.local_rank)):
        if value >= own.world_size:
            raise ConfigurationError(
                f"{name} is {value}, but {names.world_size} is {own.world_size}: unset "
                f"{name} to train in one process, or start with a launcher"
            )
    if own.world_size == 1:
        _check_other_launchers(environment)
    return own


def likely_rank(environment: Mapping[str, str]) -> OwnRank:
    """The same; one process alone where the variables are wrong, which others refuse."""
    try:
        return rank_of_environment(environment)
    except ConfigurationError:
        return OwnRank()


def without_stray_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a program that may start ranks.

    What makes no rank of several is left out: whoever looks for ranks among the processes
    of a job would take every one that inherits it for a rank.
    """
    several = likely_rank(environment).world_size > 1
    names = () if several else VARIABLES
    return {name: environment[name] for name in environment if name not in names}


def _check_other_launchers(environment: Mapping[str, str]) -> None:
    for name in _OTHER_LAUNCHERS:
        if read_number(environment, name, 1) > 1:
            raise ConfigurationError(
                f"{name} is {environment[name]}, but WORLD_SIZE and RANK do not say so: "
                "each process would train by itself. Start with the deepspeed launcher, "
                "torchrun or mpiexec of Open MPI, or export both for each process"
            )


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

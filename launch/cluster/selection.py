"""Which hosts take part in a start: the global batch stays, whoever is left."""

from __future__ import annotations

from collections.abc import Sequence

from launch.hosts import Host, count_slots
from ten_dist.errors import ConfigurationError
from ten_dist.schedule import largest_micro_batch


def select_hosts(
    hosts: Sequence[Host], global_batch_size: int, min_hosts: int
) -> list[Host]:
    """The largest number of hosts over whose ranks the batch divides, in their order.

    Of several choices it is the one with most ranks.

    Raises:
        ConfigurationError: no `min_hosts` or more will do.
    """
    # By number of ranks, the choice with most hosts.
    choices: dict[int, list[Host]] = {0: []}
    for host in hosts:
        for ranks, chosen in list(choices.items()):
            longer = [*chosen, host]
            total = ranks + host.slots
            if total not in choices or len(choices[total]) < len(longer):
                choices[total] = longer
    dividing = [
        (len(chosen), ranks)
        for ranks, chosen in choices.items()
        if ranks and global_batch_size % ranks == 0 and len(chosen) >= min_hosts
    ]
    if dividing:
        return choices[max(dividing)[1]]
    ranks = count_slots(hosts)
    left = f"{len(hosts)} host{'s' * (len(hosts) != 1)} with {ranks} ranks answer"
    if len(hosts) < min_hosts:
        raise ConfigurationError(
            f"{left}, fewer than --min_hosts {min_hosts}: bring back the others, or "
            "make it smaller"
        )
    numbers = [str(n) for n in range(1, ranks + 1) if global_batch_size % n == 0]
    raise ConfigurationError(
        f"{left}, of which no {min_hosts} or more have a number of ranks that divides "
        f"--global_batch_size {global_batch_size} ({', '.join(numbers[-8:])} would): "
        "change the slots of the hosts"
    )


def micro_batch_option(
    micro_batch_size: int | None, global_batch_size: int, ranks: int
) -> list[str]:
    """Words that replace a `--micro_batch_size` which does not divide over the ranks left.

    The global batch size, in rows, is a multiple of `ranks`.
    """
    if micro_batch_size is None or not global_batch_size % (micro_batch_size * ranks):
        return []
    smaller = largest_micro_batch(global_batch_size, ranks, micro_batch_size)
    return ["--micro_batch_size", str(smaller)]

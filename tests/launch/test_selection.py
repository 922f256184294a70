"""Which hosts take part when some are missing, and with which micro-batch."""

import pytest

from launch.cluster.selection import micro_batch_option, select_hosts
from launch.hosts import Host
from ten_dist.errors import ConfigurationError


def hosts(*slots):
    return [Host(f"10.0.0.{number}", count) for number, count in enumerate(slots, 1)]


@pytest.mark.parametrize(
    ("slots", "batch", "chosen"),
    [
        ([8, 8, 8, 8], 512, [0, 1, 2, 3]),
        ([8, 8, 8], 512, [0, 1]),
        ([1, 1, 1], 12, [0, 1, 2]),
        # As many hosts as possible, then as many ranks.
        ([8, 4, 4, 2], 16, [0, 1, 2]),
        ([2, 4, 4], 8, [1, 2]),
        ([3, 1], 4, [0, 1]),
    ],
)
def test_it_is_the_most_hosts_that_the_batch_divides_over(slots, batch, chosen):
    there = hosts(*slots)
    assert select_hosts(there, batch, 1) == [there[n] for n in chosen]


def test_none_that_will_do_is_refused_with_the_numbers_that_would():
    with pytest.raises(ConfigurationError, match=r"\(1, 2, 4, 8 would\)"):
        select_hosts(hosts(3, 6), 8, 1)
    with pytest.raises(ConfigurationError, match="no 3 or more"):
        select_hosts(hosts(1, 1, 1), 8, 3)
    with pytest.raises(ConfigurationError, match="fewer than --min_hosts 2"):
        select_hosts(hosts(8), 8, 2)
    with pytest.raises(ConfigurationError, match="0 hosts with 0 ranks answer"):
        select_hosts([], 8, 1)


def test_a_micro_batch_that_does_not_divide_becomes_smaller():
    assert micro_batch_option(4, 12, 2) == ["--micro_batch_size", "3"]
    assert micro_batch_option(4, 32, 4) == []
    assert micro_batch_option(None, 12, 2) == []

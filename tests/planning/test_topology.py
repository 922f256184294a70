"""How long collectives take, by hand."""

import pytest

from ten_dist.planning.communication import Collective, Topology


def topology(nodes, gpus, **latencies):
    return Topology(nodes, gpus, 100e9, 50e9, **latencies)


def test_a_ring_in_a_node():
    one = topology(1, 4, node_latency=1e-6)
    reduced = Collective("all_reduce", "gradients", 8e9, 10)
    # Twice three quarters of the data, and twice three steps of each call.
    assert one.seconds(reduced) == pytest.approx(2 * 0.75 * 8e9 / 100e9 + 60e-6)
    gathered = Collective("all_gather", "weights", 8e9, 10)
    assert one.seconds(gathered) == pytest.approx(one.seconds(reduced) / 2)


def test_the_slower_link_sets_the_pace():
    gathered = Collective("all_gather", "weights", 8e9, 1)
    two = topology(2, 4, node_latency=1e-6, network_latency=5e-6)
    assert two.seconds(gathered) == pytest.approx(7 / 8 * 8e9 / 50e9 + 8e-6)
    single = topology(2, 1, node_latency=1e-6, network_latency=5e-6)
    assert single.seconds(gathered) == pytest.approx(1 / 2 * 8e9 / 50e9 + 5e-6)


def test_one_rank_waits_for_nobody():
    assert topology(1, 1).seconds(Collective("all_reduce", "gradients", 1e9, 1)) == 0

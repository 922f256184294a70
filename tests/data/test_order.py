"""The order of rows: complete, pure, and the same however the work is cut up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ten_dist.data import BatchShape, RowOrder, accumulation_steps
from ten_dist.errors import ConfigurationError, DataError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, seq_len=st.integers(1, 40), seed=st.integers(0, 2**63))
def test_each_epoch_reads_each_row_once(described_set, sizes, seq_len, seed):
    manifest = described_set(*sizes)
    if sum(sizes) - 1 < seq_len:
        with pytest.raises(DataError, match="--seq_len"):
            RowOrder(manifest, seq_len, seed)
        return
    order = RowOrder(manifest, seq_len, seed)
    count = order.rows_per_epoch
    assert count == (sum(sizes) - 1) // seq_len
    epochs, rows = order.rows(0, 3 * count)
    assert epochs.dtype == rows.dtype == np.int64
    for epoch in range(3):
        piece = slice(epoch * count, (epoch + 1) * count)
        assert (epochs[piece] == epoch).all()
        assert sorted(rows[piece]) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_any_slice_is_the_slice_of_the_whole(described_set, sizes, data):
    """Positions can be asked for in any pieces and order: nothing depends on history."""
    manifest = described_set(*sizes, 10)
    order = RowOrder(manifest, 3, seed=7)
    end = 3 * order.rows_per_epoch
    epochs, rows = order.rows(0, end)
    used = RowOrder(manifest, 3, seed=7)
    for _ in range(5):
        start = data.draw(st.integers(0, end))
        stop = data.draw(st.integers(start, end))
        got_epochs, got_rows = used.rows(start, stop)
        np.testing.assert_array_equal(got_epochs, epochs[start:stop])
        np.testing.assert_array_equal(got_rows, rows[start:stop])


def test_the_order_is_what_it_was_when_first_released(described_set):
    """A run resumed with a later version must read what the first version would have."""
    manifest = described_set(40, 7, 90, 33, 12, 64, 5, 21, 80, 48)
    assert manifest.fingerprint == GOLDEN_FINGERPRINT
    order = RowOrder(manifest, 16, seed=1234)
    epochs, rows = order.rows(20, 52)
    assert epochs.tolist() == [0] * 4 + [1] * 24 + [2] * 4
    assert rows.tolist() == GOLDEN_ROWS


GOLDEN_FINGERPRINT = "52dc9915663cbd6f39914633300cf469bc5e4c45b33abd9ec83265728b125933"
GOLDEN_ROWS = [
    9,
    2,
    1,
    0,
    2,
    23,
    12,
    10,
    6,
    3,
    22,
    1,
    5,
    16,
    13,
    15,
    7,
    0,
    11,
    4,
    8,
    14,
    9,
    17,
    19,
    21,
    20,
    18,
    2,
    10,
    8,
    13,
]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"seq_len": 9},
        {"epoch": 1},
        {"vocab_size": 300},
        {"tokenizer_sha256": "1" * 64},
        {"separator_id": 0},
    ],
)
def test_order_depends_on_data_seed_epoch_and_length(described_set, change):
    sizes = [100] * 12
    reference = RowOrder(described_set(*sizes), 10, seed=1)
    count = reference.rows_per_epoch
    epoch = change.pop("epoch", 0)
    seed = change.pop("seed", 1)
    seq_len = change.pop("seq_len", 10)
    other = RowOrder(described_set(*sizes, **change), seq_len, seed)
    _, expected = reference.rows(0, count)
    start = epoch * other.rows_per_epoch
    _, rows = other.rows(start, start + count)
    assert rows.tolist() != expected.tolist()


def test_order_does_not_depend_on_where_the_set_lies_or_what_made_it(described_set):
    here = described_set(50, 60)
    there = described_set(50, 60, directory="elsewhere", source={"files": 9})
    np.testing.assert_array_equal(
        RowOrder(here, 5, 1).rows(0, 20)[1], RowOrder(there, 5, 1).rows(0, 20)[1]
    )


def test_few_shards_are_in_use_at_once(described_set):
    """A reader can stream through the epoch with one group of shards in memory."""
    manifest = described_set(*[100] * 40)
    order = RowOrder(manifest, 10, seed=3)
    _, rows = order.rows(0, order.rows_per_epoch)
    shard_of = rows * 10 // 100
    in_groups = [set(shard_of[at : at + 80]) for at in range(0, rows.size, 80)]
    assert all(len(shards) <= 8 for shards in in_groups)
    assert len(set.union(*in_groups)) == 40
    assert set(shard_of[:80]) != set(range(8))


@pytest.mark.parametrize("micro, world", [(1, 1), (24, 1), (3, 2), (2, 4), (1, 8)])
def test_micro_batches_of_all_ranks_make_up_the_global_batch(micro, world):
    accumulation = accumulation_steps(24, micro, world)
    positions = []
    for micro_step in range(accumulation):
        for rank in range(world):
            shape = BatchShape(100, micro, rank, world, accumulation)
            positions += range(*shape.positions(5 * accumulation + micro_step))
    assert positions == list(range(5 * 24, 6 * 24))


@pytest.mark.parametrize("sizes", [(10, 4, 1), (8, 3, 2), (0, 1, 1), (4, 0, 1)])
def test_a_global_batch_that_does_not_divide_is_refused(sizes):
    with pytest.raises(ConfigurationError, match="--global_batch_size"):
        accumulation_steps(*sizes)

"""Batches: the right tokens, the same for any world, workers or starting step."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ten_dist.data import BatchShape, RowOrder, evaluation_batches, training_batches
from ten_dist.errors import ConfigurationError, DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def token_set(tmp_path_factory, write_set):
    """12 shards, one tiny, one of several blocks: 85 rows of 1000 tokens and a rest."""
    sizes = [900, 1500, 3, 2000, 1000, 700, 71000, 1300, 2500, 4000, 50, 800]
    return write_set(tmp_path_factory.mktemp("tokens"), *sizes)


def batches_of(
    manifest, *, rows=8, seq_len=1000, micro=None, rank=0, world=1, seed=5, **options
):
    """Training batches of steps of ``rows`` rows, read in this process by default."""
    micro = micro or rows // world
    shape = BatchShape(seq_len, micro, rank, world, rows // micro // world)
    return training_batches(manifest, shape, seed=seed, **{"num_workers": 0, **options})


def as_lists(batches):
    return [
        (b.step, b.micro_step, b.epochs.tolist(), b.rows.tolist(), b.tokens.tolist())
        for b in batches
    ]


def test_rows_are_the_right_pieces_of_the_stream(token_set):
    """Through two epochs, rows across shard and block ends included."""
    manifest, tokens = token_set
    order = RowOrder(manifest, 1000, 5)
    steps = 2 * order.rows_per_epoch // 8
    seen = []
    for step, batch in enumerate(batches_of(manifest, last_step=steps)):
        assert (batch.step, batch.micro_step) == (step, 0)
        assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (8, 1001)
        expected = [tokens[r * 1000 : r * 1000 + 1001] for r in batch.rows]
        np.testing.assert_array_equal(batch.tokens.numpy(), expected)
        assert torch.equal(batch.inputs, batch.tokens[:, :-1])
        assert torch.equal(batch.targets, batch.tokens[:, 1:])
        seen += zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
    assert len(seen) == steps * 8
    assert seen == list(
        zip(*(part.tolist() for part in order.rows(0, steps * 8)), strict=True)
    )


def test_a_batch_straddles_epochs_and_drops_no_row(token_set):
    manifest, _ = token_set
    count = manifest.rows(1000)
    assert count % 8
    batches = list(batches_of(manifest, last_step=count // 8 + 1))
    assert set(batches[-1].epochs.tolist()) == {0, 1}
    first_epoch = [
        row
        for batch in batches
        for epoch, row in zip(batch.epochs, batch.rows, strict=True)
        if epoch == 0
    ]
    assert sorted(first_epoch) == list(range(count))


@pytest.mark.parametrize("micro, world", [(8, 1), (1, 1), (4, 2), (1, 2), (2, 4)])
def test_global_batches_are_the_same_for_any_world_and_micro_batch(
    token_set, micro, world
):
    manifest, _ = token_set
    reference = list(batches_of(manifest, last_step=15))
    ranks = [
        list(batches_of(manifest, micro=micro, world=world, rank=rank, last_step=15))
        for rank in range(world)
    ]
    accumulation = 8 // micro // world
    assert all(len(batches) == 15 * accumulation for batches in ranks)
    for step, expected in enumerate(reference):
        parts = [
            ranks[rank][step * accumulation + k]
            for k in range(accumulation)
            for rank in range(world)
        ]
        assert [part.step for part in parts] == [step] * len(parts)
        assert torch.equal(torch.cat([part.tokens for part in parts]), expected.tokens)


@st.composite
def layouts(draw, global_batch):
    """World size, micro-batch size and workers that divide a global batch."""
    worlds = [n for n in range(1, 9) if global_batch % n == 0]
    world = draw(st.sampled_from(worlds))
    share = global_batch // world
    micro = draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
    return {
        "world": world,
        "micro": micro,
        "num_workers": draw(st.integers(0, 3)),
    }


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_layout_reads_the_rows_of_the_order_from_any_step(token_set, data):
    manifest, tokens = token_set
    seq_len, seed = data.draw(st.integers(40, 3000)), data.draw(st.integers(0, 2**32))
    global_batch = data.draw(st.sampled_from([4, 6, 12, 24]))
    first = data.draw(st.integers(0, 6))
    last = first + data.draw(st.integers(1, 4))
    expected = zip(
        *RowOrder(manifest, seq_len, seed).rows(
            first * global_batch, last * global_batch
        ),
        strict=True,
    )
    common = {"seq_len": seq_len, "seed": seed, "rows": global_batch}
    layout = data.draw(layouts(global_batch))
    ranks = [
        list(
            batches_of(
                manifest,
                **common,
                **layout,
                rank=rank,
                first_step=first,
                last_step=last,
            )
        )
        for rank in range(layout["world"])
    ]
    found = []
    for turn in zip(*ranks, strict=True):
        for batch in turn:
            found += zip(batch.epochs, batch.rows, strict=True)
            for row, ids in zip(batch.rows, batch.tokens.numpy(), strict=True):
                start = row * seq_len
                np.testing.assert_array_equal(ids, tokens[start : start + seq_len + 1])
    assert found == list(expected)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(token_set, workers):
    manifest, _ = token_set
    changes = {"micro": 2, "world": 2, "rank": 1, "first_step": 3}
    inline = as_lists(batches_of(manifest, **changes, last_step=8))
    assert len(inline) == 5 * 2
    changes["num_workers"] = workers
    assert inline == as_lists(batches_of(manifest, **changes, last_step=8))
    endless = batches_of(manifest, **changes)
    assert inline == as_lists(itertools.islice(endless, 10))
    endless.close()


@pytest.mark.parametrize("first", [1, 10, 11, 25])
def test_a_run_resumed_at_any_step_reads_on(token_set, first):
    manifest, _ = token_set
    whole = as_lists(batches_of(manifest, last_step=30))
    resumed = batches_of(manifest, first_step=first, last_step=30)
    assert as_lists(resumed) == whole[first:]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_while_training_is_one_clear_line(tmp_path, write_set, workers):
    manifest, _ = write_set(tmp_path, 3000, 3000)
    (tmp_path / "shard-00001.tar").unlink()
    batches = batches_of(manifest, seq_len=100, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(itertools.islice(batches, 10))
    message = str(caught.value)
    assert "shard-00001.tar is missing" in message and "\n" not in message


def test_what_does_not_fit_is_refused_at_the_call(token_set):
    manifest, _ = token_set
    with pytest.raises(ConfigurationError, match="--accumulation_steps"):
        batches_of(manifest, micro=9)
    with pytest.raises(DataError, match="--seq_len"):
        batches_of(manifest, seq_len=10**6)
    with pytest.raises(ConfigurationError, match="rank"):
        batches_of(manifest, rank=1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [None, 1, 30])
def test_evaluation_reads_each_row_once_in_equal_batches(token_set, world, max_rows):
    manifest, tokens = token_set
    total = max_rows or manifest.rows(1000)
    ranks = [
        list(evaluation_batches(manifest, BatchShape(1000, 4, rank, world), max_rows))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows, counted = [], 0
    for batch in (batch for batches in ranks for batch in batches):
        # Not 4 where there are fewer rows: padding is computed, too.
        assert batch.tokens.shape == (min(4, -(-total // world)), 1001)
        for row, inputs, targets in zip(
            batch.rows, batch.inputs, batch.targets, strict=True
        ):
            counted += int((targets != -100).sum())
            if row < 0:
                assert (targets == -100).all()
                continue
            rows.append(int(row))
            expected = tokens[row * 1000 : row * 1000 + 1001]
            np.testing.assert_array_equal(inputs.numpy(), expected[:-1])
            np.testing.assert_array_equal(targets.numpy(), expected[1:])
    assert sorted(rows) == list(range(total))
    assert counted == total * 1000


ENDS = """
import signal, sys
# A test suite that runs in the background has its children ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ten_dist.data import BatchShape, Manifest, training_batches
batches = training_batches(
    Manifest.load(sys.argv[1]), BatchShape(100, 4), seed=1, num_workers=2
)
next(batches), next(batches)
"""
READING = "print('reading', flush=True)\n"


def start(folder, code):
    """Start a program that has read two batches and, once it says so, does ``code``."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS + code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout.readline() == "reading\n"
    return process


def end_of(process):
    # Workers hold the pipes too: this returns only when all of them are gone.
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, errors


def test_a_program_that_ends_while_workers_read_ends_quietly(tmp_path, write_set):
    write_set(tmp_path, 3000, 3000)
    assert end_of(start(tmp_path, READING + "sys.exit(3)")) == (3, "")
    status, errors = end_of(start(tmp_path, READING + "raise RuntimeError('mine')"))
    assert status == 1
    assert errors.count("Traceback") == 1 and "RuntimeError: mine" in errors


READ_ON = """
try:
    print("reading", flush=True)
    while True:
        next(batches)
except KeyboardInterrupt:
    sys.exit(4)
"""


def test_workers_end_with_an_interrupted_or_killed_program(tmp_path, write_set):
    write_set(tmp_path, 3000, 3000)
    process = start(tmp_path, READ_ON)
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (4, "")
    process = start(tmp_path, READ_ON)
    process.kill()
    assert end_of(process) == (-signal.SIGKILL, "")


def test_a_worker_that_dies_is_reported(token_set):
    manifest, _ = token_set
    batches = batches_of(manifest, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match="data worker 0 ended.* -9"):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()

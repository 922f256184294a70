"""Several token sets in proportion: which rows, when, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ten_dist.data import (
    BatchShape,
    Mixture,
    RowOrder,
    TokenReader,
    parse_mixture,
    training_batches,
)
from ten_dist.data.mixture import MixedOrder
from ten_dist.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def token_sets(tmp_path_factory, write_set):
    """Two sets of one tokenizer and different sizes."""
    folder = tmp_path_factory.mktemp("sets")
    return (
        write_set(folder / "code", 900, 70000, 1300)[0],
        write_set(folder / "prose", 4000, 2500)[0],
    )


def mixture(token_sets, *shares):
    return Mixture(("code", "prose"), token_sets, shares)


def test_parts_are_read_from_the_option():
    sources = parse_mixture("code=DIR/A:3,prose=s3://bucket/B:1")
    assert [dataclasses.astuple(source) for source in sources] == [
        ("code", "DIR/A", 0.75),
        ("prose", "s3://bucket/B", 0.25),
    ]
    for single in ("DIR", "https://host:80/DIR", "s3://bucket/DIR", "a,b"):
        assert parse_mixture(single) is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("code=A:0.5,prose=B", "'prose=B' is not NAME=DATA:WEIGHT"),
        ("code=A", "'code=A' is not NAME=DATA:WEIGHT"),
        ("code=A:half", "weight 'half'"),
        ("code=A:0,prose=B:1", "weight '0'"),
        ("code=A:inf,prose=B:1", "weight 'inf'"),
        ("code=A:1,code=B:1", "names a source twice"),
    ],
)
def test_what_is_no_mixture_is_refused(option, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_mixture(option)


def test_a_share_too_small_for_a_row_is_refused(token_sets):
    with pytest.raises(ConfigurationError, match="less than one row in 65536"):
        mixture(token_sets, 1 - 1e-6, 1e-6)


def test_sets_of_another_tokenizer_are_refused(token_sets):
    code, prose = token_sets
    other = dataclasses.replace(prose, tokenizer_sha256="1" * 64)
    with pytest.raises(DataError, match="another tokenizer"):
        mixture((code, other), 0.5, 0.5)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    start=st.integers(0, 10**12),
    length=st.integers(1, 300_000),
)
def test_any_window_holds_the_proportions(token_sets, weights, start, length):
    shares = np.array(weights) / sum(weights)
    names = tuple(f"source{n}" for n in range(len(weights)))
    mixed = Mixture(names, token_sets[:1] * len(weights), tuple(shares))
    sources, positions = mixed.sources_at(start, start + length)
    before, after = mixed.rows_before(start), mixed.rows_before(start + length)
    for source, share in enumerate(shares):
        here = positions[sources == source]
        # Within the 65,536th part to which proportions are kept, and the edges.
        slack = len(shares) + 1 + length / 65536
        assert abs(here.size - share * length) <= slack
        # A source's own rows follow one another, without a gap.
        assert (before[source], after[source] - before[source]) == (
            int(here[0]) if here.size else before[source],
            here.size,
        )
        assert np.array_equal(here, np.arange(before[source], after[source]))


def test_each_source_is_read_in_its_own_order(token_sets):
    mixed = mixture(token_sets, 0.8, 0.2)
    sources, epochs, rows = MixedOrder(mixed, 100, 7).rows(0, 1500)
    for source, manifest in enumerate(token_sets):
        here = sources == source
        expected = RowOrder(manifest, 100, 7).rows(0, int(here.sum()))
        assert np.array_equal(epochs[here], expected[0])
        assert np.array_equal(rows[here], expected[1])
    assert epochs[sources == 1].max() > epochs[sources == 0].max()


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 12, 0), (3, 2, 2)])
def test_batches_hold_the_rows_of_their_sources(token_sets, world, micro, workers):
    mixed = mixture(token_sets, 0.6, 0.4)
    expected = MixedOrder(mixed, 50, 3).rows(5 * 12, 9 * 12)
    readers = [TokenReader(manifest) for manifest in token_sets]
    ranks = [
        training_batches(
            mixed,
            BatchShape(50, micro, rank, world, 12 // micro // world),
            seed=3,
            first_step=5,
            last_step=9,
            num_workers=workers,
        )
        for rank in range(world)
    ]
    found = []
    for turn in zip(*ranks, strict=True):
        for batch in turn:
            found.append(np.stack([batch.sources, batch.epochs, batch.rows]))
            for source, row, ids in zip(batch.sources, batch.rows, batch.tokens):
                tokens = readers[source].read(row * 50, row * 50 + 51)
                assert np.array_equal(ids.numpy(), tokens)
    assert np.array_equal(np.concatenate(found, axis=1), expected)


def test_the_fingerprint_is_that_of_sets_and_proportions(token_sets):
    fingerprint = mixture(token_sets, 0.6, 0.4).fingerprint
    assert Mixture(("a", "b"), token_sets, (0.6, 0.4)).fingerprint == fingerprint
    assert mixture(token_sets, 0.4, 0.6).fingerprint != fingerprint
    assert mixture(token_sets[::-1], 0.6, 0.4).fingerprint != fingerprint

"""A short campaign of faults; the long one is `python -m tests.tools.faults`."""

import pytest

from tests.tools.faults import campaign


@pytest.mark.slow
def test_a_run_survives_kills_hangs_and_damage():
    kinds = ("job", "rank", "loader", "stop", "flip")
    happened, starts = campaign(
        faults=3, seed=7, steps=25, ranks=2, kinds=kinds, deepspeed=False
    )
    assert 1 <= sum(happened.values()) <= 3
    assert starts > 1

"""A thread that gets values ahead of need, without ever being in the way."""

from __future__ import annotations

import functools
import threading

import pytest

from ten_dist.data.prefetch import Prefetch


def test_values_are_got_in_order_and_once():
    got, all_got = [], threading.Semaphore(0)

    def get(key):
        got.append(key)
        all_got.release()
        return key * 10

    def expect(*keys):
        ahead.expect({key: functools.partial(get, key) for key in keys})

    ahead = Prefetch()
    expect(3, 1, 2)
    for _ in range(3):
        assert all_got.acquire(timeout=30)
    assert got == [3, 1, 2]
    # Those that are there stay, without being got again; 1 is let go.
    expect(2, 3, 4)
    assert all_got.acquire(timeout=30)
    assert [ahead.get(key) for key in (1, 2, 2, 3, 4)] == [None, 20, 20, 30, 40]
    assert got == [3, 1, 2, 4]
    ahead.drop(2)
    ahead.drop(2)
    assert ahead.get(2) is None


def test_one_value_at_a_time_and_none_after_the_end(gated):
    action, begun, gate = gated("slow")
    got, later = [], threading.Event()
    ahead = Prefetch()
    ahead.expect({"slow": action, "never": lambda: got.append("never")})
    assert begun.wait(30)
    # Of what is expected now, nothing is begun beside what is under way.
    ahead.expect({"slow": action, "next": lambda: got.append("next") or later.set()})
    assert not later.wait(0.2)
    gate.set()
    assert later.wait(30) and got == ["next"]

    action, begun, gate = gated("slow")
    ahead.expect({"last": action, "behind": lambda: got.append("behind")})
    assert begun.wait(30)
    ahead.close()
    gate.set()
    # What is expected after that is got, without what was let go.
    later.clear()
    ahead.expect({"again": later.set})
    assert later.wait(30) and got == ["next"]


@pytest.fixture
def gated():
    """Function: outcome -> (action that waits for the gate, begun, gate)."""

    def make(outcome):
        begun, gate = threading.Event(), threading.Event()

        def action():
            begun.set()
            assert gate.wait(30)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return action, begun, gate

    return make


def test_whoever_needs_a_value_first_gets_it_or_waits_for_it(gated):
    action, begun, gate = gated("slow")
    ahead, behind = Prefetch(), []
    ahead.expect({"slow": action, "behind": lambda: behind.append(1) or "behind"})
    assert begun.wait(30)
    # Not begun: it need not wait for what the thread is at.
    assert ahead.get("behind") == "behind"
    threading.Timer(0.05, gate.set).start()
    assert ahead.get("slow") == "slow"
    assert ahead.get("behind") == "behind" and behind == [1]


def test_a_failure_is_tried_again_by_whoever_has_not_waited_for_it(gated):
    action, begun, gate = gated(OSError("no answer"))
    after = threading.Event()
    ahead = Prefetch()
    ahead.expect({"bad": action, "good": lambda: after.set() or "good"})
    assert begun.wait(30)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(OSError, match="no answer"):
        ahead.get("bad")
    # The thread goes on behind a failure.
    assert after.wait(30) and ahead.get("good") == "good"
    begun.clear()
    with pytest.raises(OSError, match="no answer"):
        ahead.get("bad")
    assert begun.is_set(), "it was tried again"

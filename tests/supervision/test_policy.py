"""What the supervisor decides after each way in which a job can end."""

import pytest

from ten_dist.errors import ConfigurationError
from ten_dist.supervision.policy import Policy, SupervisionConfig


def decide_all(endings, checkpoint_step=0, **limits):
    """Actions and delays after each of the endings."""
    policy = Policy(SupervisionConfig(**limits), checkpoint_step)
    return [(d.action, d.delay) for d in (policy.decide(*e) for e in endings)]


def failed(step, checkpoint=0, status=1):
    return status, step, checkpoint


def test_status_0_is_no_success():
    assert decide_all([failed(5, status=0)]) == [("restart", 10.0)]


def test_a_refused_job_is_not_retried():
    assert decide_all([failed(None, status=2)]) == [("refused", 0.0)]


def test_restarts_without_progress_wait_ever_longer_and_run_out():
    decisions = decide_all(
        [failed(None)] * 6, max_restarts=5, backoff=10.0, max_backoff=60.0
    )
    delays = [10.0, 20.0, 40.0, 60.0, 60.0]
    assert decisions == [*(("restart", d) for d in delays), ("give up", 0.0)]


def test_a_new_checkpoint_replenishes_the_budget():
    endings = [failed(5), failed(6), failed(9, 8), failed(12, 8), failed(13, 8)]
    decisions = decide_all(endings, max_restarts=2)
    delays = [10.0, 20.0, 10.0, 20.0]
    assert decisions == [*(("restart", d) for d in delays), ("give up", 0.0)]


def test_a_checkpoint_of_before_is_no_progress():
    decisions = decide_all([failed(9, 8), failed(10, 8)], 8, max_restarts=1)
    assert [action for action, _ in decisions] == ["restart", "give up"]


def test_the_same_step_failing_again_and_again_ends_it():
    endings = [failed(7), failed(6), failed(7), failed(7)]
    actions = [action for action, _ in decide_all(endings)]
    assert actions == ["restart", "restart", "restart", "give up"]


def test_a_step_that_was_saved_is_forgotten():
    endings = [failed(7), failed(7), failed(9, 8), failed(7, 8), failed(9, 8)]
    actions = {action for action, _ in decide_all(endings)}
    assert actions == {"restart"}


def test_being_told_to_stop_is_no_failure_of_a_step():
    actions = {a for a, _ in decide_all([failed(7, status=3)] * 5)}
    assert actions == {"restart"}


@pytest.mark.parametrize(
    "limits",
    [{"max_restarts": -1}, {"max_failures_per_step": 0}, {"grace": float("nan")}],
)
def test_limits_make_sense(limits):
    (name,) = limits
    with pytest.raises(ConfigurationError, match=f"--{name} must be"):
        SupervisionConfig(**limits)

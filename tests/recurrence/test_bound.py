"""The bound on the energy of a scan holds, is nearly reached, and finds what breaks it."""

import pytest
import torch

from ten_dist.recurrence import ScanInputs, available_backends, eigenstate_scan
from ten_dist.recurrence.bound import EnergyBound
from ten_dist.recurrence.observer import observed


def arguments(batch=2, length=50, eigenstates=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    width = 2 * eigenstates
    return {
        "beta": draw(batch, length, width),
        "alpha": draw(eigenstates) * 3,
        "omega": draw(eigenstates),
        "modulation": draw(batch, length, width),
        "initial_state": draw(batch, width),
    }


@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("backend", [b for b in available_backends() if b != "triton"])
def test_every_backend_keeps_it(backend, input_norm):
    with observed(EnergyBound()) as bound:
        eigenstate_scan(**arguments(), input_norm=input_norm, backend=backend)
    assert 0.05 < bound.largest_ratio <= 1 + 1e-6
    assert 0 < bound.eigenvalue_distance < 0.1


def test_it_is_reached_where_nothing_is_forgotten():
    given = arguments(length=20)
    given |= {"modulation": None, "initial_state": None}
    given["alpha"] = torch.full_like(given["alpha"], 15.0)
    given["omega"] = torch.zeros_like(given["omega"])
    given["beta"] = torch.ones_like(given["beta"])
    with observed(EnergyBound()) as bound:
        eigenstate_scan(**given)
    assert bound.largest_ratio == pytest.approx(1, abs=1e-5)
    assert bound.eigenvalue_distance == pytest.approx(3.06e-7, rel=1e-2)


def test_scans_outside_of_the_block_are_not_seen():
    with observed(EnergyBound()) as bound:
        pass
    eigenstate_scan(**arguments())
    assert bound.largest_ratio == 0


@pytest.mark.parametrize("fault", [3.0, float("nan")])
def test_states_that_no_input_made_are_found(fault):
    given = arguments()
    states, _ = eigenstate_scan(**given | {"initial_state": None})
    states[1, 0] = given["beta"][1].norm(dim=-1).max() * fault
    ranges = torch.zeros(2, given["alpha"].numel())
    given["initial_state"] *= 0
    bound = EnergyBound()
    bound.see(ScanInputs(**given, ranges=ranges), states)
    assert not bound.largest_ratio <= 1.01

"""Resets: from there on the state is what it would be if nothing had come before."""

import itertools

import pytest
import torch

from benchmarks.scan_comparison import (
    TOLERANCE,
    assert_near,
    make_inputs,
    make_resets,
    run,
)
from ten_dist.recurrence import (
    ScanInputs,
    available_backends,
    eigenstate_scan_with_energy,
)

# Those that compute in float64, and the one compiled for the CPU; that of GPUs is in
# test_triton_backend.py.
EXACT_BACKENDS = ["blocked", "reference"]
CPU_BACKENDS = [*EXACT_BACKENDS, *(n for n in available_backends() if n == "cpu")]


def scan(inputs, backend, **options):
    return eigenstate_scan_with_energy(ScanInputs(**inputs, **options), backend)


def stretches(resets):
    """First and last step (exclusive) between two resets of one row."""
    starts = [0, *(t for t in resets.nonzero().flatten().tolist() if t > 0)]
    return list(zip(starts, [*starts[1:], len(resets)], strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("modulated", [True, False])
def test_a_stretch_is_what_it_is_alone(backend, input_norm, modulated):
    inputs = make_inputs(70, 20, torch.float32, modulated=modulated)
    resets = make_resets(3, 70)
    options = {"input_norm": input_norm, "backend": backend}
    states, final, energy = scan(inputs, **options, resets=resets)
    for row in range(3):
        energy_of_row = torch.zeros(20)
        for start, stop in stretches(resets[row]):
            alone = dict(inputs, beta=inputs["beta"][row, None, start:stop])
            if modulated:
                alone["modulation"] = inputs["modulation"][row, None, start:stop]
            entering = inputs["initial_state"][row, None]
            fresh = start > 0 or bool(resets[row, 0])
            alone["initial_state"] = None if fresh else entering
            expected, last, part = scan(alone, **options)
            torch.testing.assert_close(
                states[row, start:stop], expected[0], rtol=1e-4, atol=1e-5
            )
            energy_of_row += part[0]
        torch.testing.assert_close(final[row], last[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(energy[row], energy_of_row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("modulated", [True, False])
def test_gradients_agree_with_finite_differences(backend, input_norm, modulated):
    inputs = make_inputs(7, 2, torch.float64, batch=2, modulated=modulated)
    inputs["alpha"] = torch.tensor([-1.0, 2.0])
    inputs = {name: t.double().requires_grad_() for name, t in inputs.items()}
    resets = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()

    def function(*tensors):
        given = dict(zip(inputs, tensors))
        return scan(given, backend, input_norm=input_norm, resets=resets)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
def test_blocked_equals_the_oracle(steps, input_norm):
    for modulated, initial in itertools.product([True, False], repeat=2):
        inputs = make_inputs(
            steps, 5, torch.float64, modulated=modulated, initial=initial
        )
        resets = make_resets(3, steps)
        actual = run(inputs, "blocked", input_norm, wide=True, resets=resets)
        expected = run(inputs, "reference", input_norm, wide=True, resets=resets)
        assert_near(actual, expected, 1e-10)


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("steps", "width"), [(1, 5), (2, 16), (32, 17), (33, 16), (65, 7), (300, 40)]
)
def test_the_compiled_scan_equals_the_oracle(dtype, input_norm, steps, width):
    for modulated, initial in itertools.product([True, False], repeat=2):
        inputs = make_inputs(steps, width, dtype, modulated=modulated, initial=initial)
        if dtype != torch.float32:
            inputs["alpha"] = inputs["alpha"].clamp(max=4.0)
        # Columns of a wider tensor.
        resets = make_resets(3, steps + 1)[:, 1:]
        # At the ends of the tiles that time is cut into.
        resets[1, 31::32] = resets[1, 32::32] = True
        actual = run(inputs, "cpu", input_norm, resets=resets)
        expected = run(inputs, "reference", input_norm, wide=True, resets=resets)
        assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_was_before_a_reset_changes_no_bit(backend):
    inputs = make_inputs(50, 20, torch.float32)
    resets = torch.zeros(3, 50, dtype=torch.bool)
    resets[:, [17, 40]] = True
    results = []
    for _ in range(2):
        states, final, _ = scan(inputs, backend, resets=resets)
        results.append((states[:, 17:40], states[:, 40:], final))
        for name in ("beta", "modulation"):
            inputs[name][:, :17] += 1.0
        inputs["initial_state"] -= 3.0
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_resets_that_are_not_there_change_no_bit(backend):
    inputs = make_inputs(100, 20, torch.float32)
    never = torch.zeros(3, 100, dtype=torch.bool)
    without = run(inputs, backend, "dynamic")
    with_none = run(inputs, backend, "dynamic", resets=never)
    assert all(torch.equal(with_none[name], without[name]) for name in without)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pieces_carry_what_resets_leave(backend):
    inputs = make_inputs(60, 20, torch.float32)
    resets = make_resets(3, 60)
    whole, final, _ = scan(inputs, backend, resets=resets)
    state, pieces = inputs["initial_state"], []
    for start, stop in ((0, 1), (1, 33), (33, 34), (34, 60)):
        piece = dict(inputs, initial_state=state)
        for name in ("beta", "modulation"):
            piece[name] = inputs[name][:, start:stop]
        states, state, _ = scan(piece, backend, resets=resets[:, start:stop])
        pieces.append(states)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "resets",
    [torch.zeros(3, 9, dtype=torch.bool), torch.zeros(3, 8), torch.zeros(8).bool()],
)
def test_wrong_resets_are_named(resets):
    inputs = make_inputs(8, 4, torch.float32)
    with pytest.raises(ValueError, match=r"resets must be bool \[3, 8\]"):
        scan(inputs, "auto", resets=resets)

"""Compiled backends against the float64 oracle, on the same rounded inputs."""

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

BACKENDS = [name for name in available_backends() if name in ("cpu",)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("steps", "width"), [(1, 5), (2, 16), (63, 17), (64, 40), (65, 7), (1000, 33)]
)
def test_backend_equals_the_oracle(backend, dtype, input_norm, steps, width):
    for modulated, initial in itertools.product([True, False], repeat=2):
        inputs = make_inputs(steps, width, dtype, modulated=modulated, initial=initial)
        if dtype != torch.float32:
            # Rounded states at a decay of 0.9999 are off by their own resolution for
            # thousands of steps; gradients through them as well.
            inputs["alpha"] = inputs["alpha"].clamp(max=4.0)
        actual = run(inputs, backend, input_norm)
        expected = run(inputs, "reference", input_norm, wide=True)
        assert actual["states"].dtype == dtype
        assert actual["final"].dtype == actual["energy"].dtype == torch.float32
        assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("largest", [0.0, 0.1, 0.2, 0.201])
def test_small_selection_ranges_equal_the_oracle(backend, input_norm, largest):
    """Backends may take a shorter way there, up to ranges of their own."""
    inputs = make_inputs(200, 37, torch.float32)
    inputs["alpha"] = torch.linspace(-12, 12, 37)
    inputs["ranges"] = torch.stack(
        [torch.linspace(-largest, largest, 37), torch.linspace(largest, 0.0, 37)]
    )
    actual = run(inputs, backend, input_norm)
    expected = run(inputs, "reference", input_norm, wide=True)
    assert_near(actual, expected, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_is_not_finite_stays_so(backend, dtype):
    """Training finds a broken step by its loss."""
    inputs = make_inputs(20, 16, dtype)
    inputs["modulation"][0, 7, 3] = torch.nan
    inputs["beta"][1, 9, 20] = torch.inf
    states = run(inputs, backend, "none")["states"]
    assert states[0, 7:, [3, 19]].isnan().all()
    assert not states[1, 10:, [4, 20]].isfinite().any()
    assert states[2].isfinite().all() and states[:, :7].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_takes_the_views_of_one_projection(backend):
    """What a mixer passes: parts of a wider tensor, and a transposed one."""
    width = 24
    parts = torch.randn(2, 50, 5 * width)
    views = {
        "beta": parts[..., : 2 * width],
        "modulation": parts[..., 2 * width : 4 * width],
    }
    swapped = {
        name: v.transpose(1, 2).contiguous().transpose(1, 2)
        for name, v in views.items()
    }
    common = {
        "alpha": torch.linspace(-2, 5, width),
        "omega": torch.randn(width),
        "ranges": torch.full((2, width), 0.1),
    }
    whole = {name: v.contiguous() for name, v in views.items()}
    expected = eigenstate_scan_with_energy(ScanInputs(**whole, **common), backend)
    for inputs in (views, swapped):
        actual = eigenstate_scan_with_energy(ScanInputs(**inputs, **common), backend)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_repetitions_are_identical(backend):
    threads = torch.get_num_threads()
    inputs = make_inputs(300, 70, torch.float32)
    try:
        results = []
        for repetition in range(20):
            torch.set_num_threads(1 + repetition % 4)
            results.append(run(inputs, backend, "dynamic"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_larger_than_its_results_is_kept(backend):
    """For backward: the arguments and the states, which the caller holds anyway."""
    inputs = make_inputs(200, 32, torch.float32)
    held = {tensor.data_ptr() for tensor in inputs.values()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states, *_ = eigenstate_scan_with_energy(ScanInputs(**leaves), backend)
    large = [t for t in kept if t.numel() >= 3 * 200 * 32]
    held.add(states.data_ptr())
    assert large and all(t.data_ptr() in held for t in large)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_well_behaved_under_tracing(backend):
    inputs = make_inputs(9, 8, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    assert backend == "cpu"
    for resets in (None, make_resets(3, 9)):
        arguments = ScanInputs(**leaves, resets=resets, input_norm="dynamic")
        operator = torch.ops.ten_dist_cpu.scan_forward.default
        torch.library.opcheck(operator, tuple(arguments))

"""Every backend of the matrix scan against the float64 oracle, on the same rounded inputs."""

import pytest
import torch

from ten_dist.matrix_recurrence import MatrixScanInputs, available_backends, matrix_scan
from tests.matrix_recurrence.matrix_comparison import (
    SEQUENCES,
    TOLERANCE,
    assert_near,
    make_matrix_inputs,
    make_resets,
    run_matrix,
    scan_of,
)

BACKENDS = [name for name in available_backends() if name in ("cpu", "blocked")]
# Steps, eigenstates of a head, numbers that one carries.
SHAPES = [(1, 5, 3), (2, 16, 16), (63, 1, 1), (64, 16, 32), (65, 5, 33), (150, 17, 48)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


every_shape = pytest.mark.parametrize(("steps", "eigenstates", "numbers"), SHAPES)


@every_backend
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@every_shape
def test_backend_equals_the_oracle(backend, input_norm, steps, eigenstates, numbers):
    for initial, resets in ((False, None), (True, make_resets(3, steps))):
        inputs = make_matrix_inputs(
            steps, eigenstates, numbers, torch.float32, initial=initial
        )
        options = {"input_norm": input_norm, "resets": resets}
        actual = run_matrix(inputs, backend, **options)
        expected = run_matrix(inputs, "reference", wide=True, **options)
        assert_near(actual, expected, TOLERANCE[torch.float32])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_shape
def test_half_precision_equals_the_oracle(backend, dtype, steps, eigenstates, numbers):
    inputs = make_matrix_inputs(steps, eigenstates, numbers, dtype)
    actual = run_matrix(inputs, backend, input_norm="dynamic")
    expected = run_matrix(inputs, "reference", wide=True, input_norm="dynamic")
    assert actual["outputs"].dtype == actual["grad key"].dtype == dtype
    assert actual["final"].dtype == actual["energy"].dtype == torch.float32
    assert_near(actual, expected, TOLERANCE[dtype])


@every_backend
@pytest.mark.slow
def test_long_memories_over_a_long_sequence_equal_the_oracle(backend):
    inputs = make_matrix_inputs(4096, 5, 8, torch.float32, batch=1, longest_memory=2048)
    actual = run_matrix(inputs, backend, input_norm="dynamic")
    expected = run_matrix(inputs, "reference", wide=True, input_norm="dynamic")
    assert_near(actual, expected, TOLERANCE[torch.float32])


@every_backend
def test_any_number_of_heads_equals_the_oracle(backend):
    for heads in (1, 3):
        inputs = make_matrix_inputs(70, 7, 9, torch.float32, heads=heads)
        actual = run_matrix(inputs, backend, heads=heads)
        expected = run_matrix(inputs, "reference", wide=True, heads=heads)
        assert_near(actual, expected, TOLERANCE[torch.float32])


@every_backend
def test_pieces_give_the_whole(backend):
    inputs = make_matrix_inputs(200, 6, 20, torch.float32)
    resets = make_resets(3, 200)
    whole = scan_of(inputs, backend, resets=resets)
    state, pieces = inputs["initial_state"], []
    for start, stop in ((0, 1), (1, 65), (65, 66), (66, 200)):
        piece = inputs | {name: inputs[name][:, start:stop] for name in SEQUENCES}
        piece["initial_state"] = state
        results = scan_of(piece, backend, resets=resets[:, start:stop])
        pieces.append(results["outputs"])
        state = results["final"]
    torch.testing.assert_close(
        torch.cat(pieces, 1), whole["outputs"], rtol=1e-4, atol=5e-5
    )
    torch.testing.assert_close(state, whole["final"], rtol=1e-4, atol=1e-5)


@every_backend
def test_outputs_do_not_depend_on_later_tokens(backend):
    inputs = make_matrix_inputs(100, 6, 20, torch.float32)
    outputs = scan_of(inputs, backend)["outputs"]
    for name in SEQUENCES:
        inputs[name][:, 70:] += 1.0
    assert torch.equal(scan_of(inputs, backend)["outputs"][:, :70], outputs[:, :70])


@every_backend
def test_nothing_of_before_a_reset_is_seen_after_it(backend):
    """Not even what is no number, and not by gradients either."""
    resets = torch.zeros(3, 100, dtype=torch.bool)
    resets[:, [17, 64]] = True
    results = []
    for before in (1.0, torch.nan):
        inputs = make_matrix_inputs(100, 6, 20, torch.float32)
        for name in SEQUENCES:
            inputs[name][:, :17] += before
        inputs["initial_state"] += before
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        seen = scan_of(leaves, backend, resets=resets, input_norm="dynamic")
        loss = seen["outputs"][:, 17:].square().sum() + seen["final"].sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in SEQUENCES])
        results.append(
            [seen["outputs"][:, 17:], seen["final"], *(g[:, 17:] for g in gradients)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_backend
def test_resets_that_are_not_there_change_no_bit(backend):
    inputs = make_matrix_inputs(100, 6, 20, torch.float32)
    without = run_matrix(inputs, backend)
    never = run_matrix(inputs, backend, resets=torch.zeros(3, 100, dtype=torch.bool))
    assert all(torch.equal(never[name], without[name]) for name in without)


@every_backend
def test_backend_takes_the_views_of_one_projection(backend):
    """What a mixer passes: parts of a wider tensor, and a transposed one."""
    inputs = make_matrix_inputs(50, 12, 24, torch.float32)
    widths = [inputs[name].shape[-1] for name in SEQUENCES]
    parts = torch.cat([inputs[name] for name in SEQUENCES], dim=-1).split(widths, -1)
    views = dict(zip(SEQUENCES, parts, strict=True))
    swapped = {
        name: view.transpose(1, 2).contiguous().transpose(1, 2)
        for name, view in views.items()
    }
    expected = run_matrix(inputs, backend)
    for given in (views, swapped):
        actual = scan_of(inputs | given, backend)
        assert all(torch.equal(actual[name], expected[name]) for name in actual)


@every_backend
def test_repetitions_are_identical(backend):
    threads = torch.get_num_threads()
    inputs = make_matrix_inputs(130, 17, 20, torch.float32)
    try:
        results = []
        for repetition in range(8):
            torch.set_num_threads(1 + repetition % 4)
            results.append(run_matrix(inputs, backend, input_norm="dynamic"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@every_backend
@pytest.mark.slow
def test_a_compiled_graph_holds_the_scan(backend):
    def function(inputs):
        outputs, final, energy = matrix_scan(inputs, backend)
        return 2 * outputs, final + 1, energy

    inputs = make_matrix_inputs(70, 6, 20, torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = {
            name: tensor.clone().requires_grad_() for name, tensor in inputs.items()
        }
        values = call(MatrixScanInputs(**leaves, num_heads=2, input_norm="dynamic"))
        loss = sum(value.square().sum() for value in values)
        results.append([*values, *torch.autograd.grad(loss, list(leaves.values()))])
    torch.testing.assert_close(*results)

"""The Triton matrix scan against the float64 oracle: on a GPU, else in Triton's interpreter.

The interpreter takes seconds for each chunk, so that without a GPU chunks and lengths are
the least.
"""

import pytest
import torch

from ten_dist.matrix_recurrence import (
    MatrixScanInputs,
    available_backends,
    matrix_scan,
    matrix_triton,
)
from tests.matrix_recurrence.matrix_comparison import (
    SEQUENCES,
    TOLERANCE,
    assert_near,
    make_matrix_inputs,
    make_resets,
    run_matrix,
    scan_of,
)

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
on_gpu_only = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Kernels are interpreted if this is set when their modules are imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(matrix_triton, "CHUNK", 16)


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def assert_equals_the_oracle(inputs, resets=None, **options):
    dtype = inputs["key"].dtype
    on = None if resets is None else resets.to(DEVICE)
    actual = run_matrix(on_device(inputs), "triton", resets=on, **options)
    expected = run_matrix(inputs, "reference", wide=True, resets=resets, **options)
    assert actual["outputs"].dtype == dtype
    assert actual["final"].dtype == actual["energy"].dtype == torch.float32
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("input_norm", "initial", "reset"),
    [("none", False, True), ("static", True, False), ("dynamic", True, True)],
)
def test_scan_equals_the_oracle(input_norm, initial, reset):
    """Two chunks, the second of them short."""
    inputs = make_matrix_inputs(19, 3, 5, torch.float32, batch=2, initial=initial)
    resets = make_resets(2, 19) if reset else None
    assert_equals_the_oracle(inputs, resets, input_norm=input_norm)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_oracle(dtype):
    inputs = make_matrix_inputs(9, 3, 5, dtype, batch=1, longest_memory=50)
    assert_equals_the_oracle(inputs, input_norm="dynamic")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eigenstates", "numbers", "heads"), [(1, 1, 3), (17, 33, 1), (40, 2, 1)]
)
def test_sizes_need_not_be_powers_of_two(monkeypatch, eigenstates, numbers, heads):
    """In the second, a head has three blocks of its numbers."""
    monkeypatch.setattr(matrix_triton, "STATE_ELEMENTS", 16 * 16)
    inputs = make_matrix_inputs(
        5, eigenstates, numbers, torch.float32, heads=heads, batch=1
    )
    assert_equals_the_oracle(inputs, heads=heads, input_norm="dynamic")


@pytest.mark.slow
def test_slow_steps_after_strong_decay_keep_their_digits():
    inputs = make_matrix_inputs(16, 2, 3, torch.float32, batch=1)
    inputs["alpha"] = torch.zeros(4)
    inputs["ranges"] = torch.tensor([12.0, 0.5]).unsqueeze(1).expand(2, 4).contiguous()
    inputs["modulation"][:, :, :4] = -10.0
    inputs["modulation"][:, 12:, :4] = 10.0
    actual = run_matrix(on_device(inputs), "triton", input_norm="dynamic")
    expected = run_matrix(inputs, "reference", wide=True, input_norm="dynamic")
    # That of alpha is small here, as a difference of larger numbers.
    del expected["grad alpha"]
    assert_near(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_result_alone(used):
    """Of the output, the final state or the energy; the others have no gradient."""
    inputs = make_matrix_inputs(5, 2, 3, torch.float32, batch=1)
    gradients = []
    for backend, wide in (("triton", False), ("reference", True)):
        leaves = {
            n: (t.double() if wide else t.to(DEVICE)).requires_grad_()
            for n, t in inputs.items()
        }
        results = matrix_scan(MatrixScanInputs(**leaves, num_heads=2), backend)
        found = torch.autograd.grad(
            results[used].square().sum(),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        gradients.append(dict(zip(leaves, found)))
    assert_near(*gradients, TOLERANCE[torch.float32])


@pytest.mark.slow
def test_nothing_of_before_a_reset_is_seen_after_it():
    resets = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    resets[:, 4] = True
    results = []
    for before in (1.0, torch.nan):
        inputs = on_device(make_matrix_inputs(9, 2, 3, torch.float32, batch=1))
        for name in SEQUENCES:
            inputs[name][:, :4] += before
        inputs["initial_state"] += before
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        seen = scan_of(leaves, "triton", resets=resets, input_norm="dynamic")
        loss = seen["outputs"][:, 4:].square().sum() + seen["final"].sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in SEQUENCES])
        assert seen["outputs"][:, 3].isnan().all() == (before != 1.0)
        results.append(
            [seen["outputs"][:, 4:], seen["final"], *(g[:, 4:] for g in gradients)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_scan_takes_the_views_of_one_projection():
    inputs = on_device(make_matrix_inputs(5, 2, 3, torch.float32, batch=2))
    widths = [inputs[name].shape[-1] for name in SEQUENCES]
    parts = torch.cat([inputs[name] for name in SEQUENCES], dim=-1).split(widths, -1)
    views = dict(zip(SEQUENCES, parts, strict=True))
    actual, expected = (run_matrix(i, "triton") for i in (inputs | views, inputs))
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.slow
def test_operator_is_well_behaved_under_tracing():
    inputs = on_device(make_matrix_inputs(3, 2, 3, torch.float32, batch=1))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    arguments = MatrixScanInputs(**leaves, num_heads=2, input_norm="dynamic")
    operator = torch.ops.ten_dist_triton.matrix_scan_forward.default
    torch.library.opcheck(operator, tuple(arguments))


def test_only_the_arguments_are_kept():
    inputs = on_device(make_matrix_inputs(3, 4, 8, torch.float32, batch=1))
    kept = []
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        scan_of(leaves, "triton")
    held = {tensor.data_ptr() for tensor in inputs.values()}
    new = [t for t in kept if t.is_floating_point() and t.data_ptr() not in held]
    assert kept and not new


@on_gpu_only
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("steps", "eigenstates", "numbers"),
    [(1, 5, 3), (64, 16, 128), (257, 64, 64), (1000, 128, 17), (65, 100, 100)],
)
def test_sizes_that_only_a_gpu_can_take(
    monkeypatch, dtype, steps, eigenstates, numbers
):
    inputs = make_matrix_inputs(steps, eigenstates, numbers, dtype)
    for chunk in (16, 32, 64):
        monkeypatch.setattr(matrix_triton, "CHUNK", chunk)
        assert_equals_the_oracle(inputs, make_resets(3, steps), input_norm="dynamic")


@on_gpu_only
def test_repetitions_are_identical():
    inputs = on_device(make_matrix_inputs(500, 32, 64, torch.float32))
    first, *others = (run_matrix(inputs, "triton") for _ in range(10))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_backend_is_listed_where_it_runs(monkeypatch):
    assert "triton" in available_backends()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ("triton" in available_backends()) == ON_GPU


def test_what_the_kernels_do_not_take_is_refused(monkeypatch):
    inputs = make_matrix_inputs(2, 2, 3, torch.float32)
    with pytest.raises(ValueError, match="triton cannot run: it takes float32"):
        scan_of({name: tensor.double() for name, tensor in inputs.items()}, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton cannot run: .* GPUs"):
        scan_of(inputs, "triton")

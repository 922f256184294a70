"""The Triton scan against the float64 oracle: on a GPU, else in Triton's interpreter.

The interpreter takes some 30 ms for each step of each row, so that without a GPU chunks
and lengths are tiny; the last test compiles the kernels for a GPU all the same.
"""

import itertools
import json
import os
import subprocess
import sys
import warnings

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
    as_ranges,
    available_backends,
    eigenstate_scan,
    eigenstate_scan_with_energy,
    scan,
    triton_scan,
)
from tests.tools.launching import ROOT

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


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 steps, two of them read ahead."""
    monkeypatch.setattr(triton_scan, "chunk_steps", lambda steps: 4)
    monkeypatch.setattr(triton_scan, "UNROLL", 2)
    monkeypatch.setattr(triton_scan, "UNROLL_BACKWARD", 2)


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def assert_equals_the_oracle(inputs, input_norm="none", tolerance=None, resets=None):
    dtype = inputs["beta"].dtype
    on = None if resets is None else resets.to(DEVICE)
    actual = run(on_device(inputs), "triton", input_norm, resets=on)
    expected = run(inputs, "reference", input_norm, wide=True, resets=resets)
    assert actual["states"].dtype == dtype
    assert actual["final"].dtype == actual["energy"].dtype == torch.float32
    assert_near(actual, expected, tolerance or TOLERANCE[dtype])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_scan_equals_the_oracle(input_norm, modulated, initial):
    """Three chunks, the last of them short; decays from 0.05 to 0.9999."""
    inputs = make_inputs(
        11, 5, torch.float32, batch=2, modulated=modulated, initial=initial
    )
    assert_equals_the_oracle(inputs, input_norm)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_resets_equal_the_oracle(input_norm, modulated, initial):
    """At both ends, one after the other, and at the ends of chunks."""
    inputs = make_inputs(
        11, 5, torch.float32, batch=3, modulated=modulated, initial=initial
    )
    resets = make_resets(3, 11)
    resets[1] = False
    resets[1, [3, 4, 8]] = True
    assert_equals_the_oracle(inputs, input_norm, resets=resets)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_resets_of_one_chunk_equal_the_oracle(steps):
    inputs = make_inputs(steps, 3, torch.bfloat16, batch=2)
    inputs["alpha"] = inputs["alpha"].clamp(max=4.0)
    # Columns of a wider tensor.
    resets = make_resets(2, steps + 1)[:, 1:]
    assert_equals_the_oracle(inputs, "dynamic", resets=resets)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_length_need_not_fit_the_chunks(steps):
    assert_equals_the_oracle(make_inputs(steps, 3, torch.float32, batch=1))


@pytest.mark.usefixtures("small_chunks")
def test_inputs_may_differ_in_dtype():
    inputs = make_inputs(6, 5, torch.float32, batch=1)
    inputs["modulation"] = inputs["modulation"].bfloat16()
    # Half of the last bit of the bfloat16 gradient of the modulation.
    assert_equals_the_oracle(inputs, tolerance=2**-8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("input_norm", ["none", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_values_equal_the_oracle(dtype, input_norm):
    inputs = make_inputs(11, 5, dtype, batch=2)
    # Rounded states at a decay of 0.9999 are off by their own resolution.
    inputs["alpha"] = inputs["alpha"].clamp(max=4.0)
    assert_equals_the_oracle(inputs, input_norm)


@pytest.mark.usefixtures("small_chunks")
def test_several_blocks_of_eigenstates():
    width = triton_scan.BLOCK + 1
    assert_equals_the_oracle(make_inputs(5, width, torch.float32, batch=2))


def test_chunks_of_the_real_size():
    """A chunk of 64 steps and a piece of the next, read ahead as on a GPU."""
    assert_equals_the_oracle(make_inputs(75, 4, torch.float32, batch=1), "dynamic")


@pytest.mark.usefixtures("small_chunks")
def test_many_chunks_are_carried_in_groups(monkeypatch):
    """Ten chunks in four groups of three, these in two groups: two levels, both ways."""
    monkeypatch.setattr(triton_scan, "CARRY_LIMIT", 3)
    monkeypatch.setattr(triton_scan, "CARRY_GROUP", 3)
    levels = []
    carry = triton_scan._carry
    monkeypatch.setattr(
        triton_scan, "_carry", lambda *a, **k: levels.append(1) or carry(*a, **k)
    )
    inputs = make_inputs(38, 3, torch.float32, batch=1)
    assert_equals_the_oracle(inputs, "static")
    assert len(levels) == 2 * 3
    resets = torch.zeros(1, 38, dtype=torch.bool)
    resets[0, [13, 24]] = True
    assert_equals_the_oracle(inputs, "static", resets=resets)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("selection_range", [(8.0, 8.0), (0.0, 0.0)])
def test_selection_may_be_strong(selection_range):
    inputs = make_inputs(9, 5, torch.float32, batch=1)
    inputs["ranges"] = torch.tensor(selection_range).unsqueeze(1).expand(2, 5)
    inputs["modulation"] *= 4
    assert_equals_the_oracle(inputs, "dynamic")


@pytest.mark.usefixtures("small_chunks")
def test_extreme_logits_stay_finite():
    """Decays that float32 rounds to 0 or 1, many turns a step, modulation far beyond
    what tanh bounds."""
    inputs = make_inputs(6, 4, torch.float32, batch=1)
    inputs["alpha"] = torch.tensor([-120.0, 120.0, -30.0, 17.0])
    inputs["omega"] = torch.tensor([1.0, -1000.0, 300.0, 7000.0])
    inputs["modulation"] = 1e4 * inputs["modulation"].sign()
    assert_equals_the_oracle(inputs, "dynamic")


@pytest.mark.usefixtures("small_chunks")
def test_not_a_number_is_not_hidden():
    inputs = on_device(make_inputs(3, 4, torch.float32, batch=1))
    inputs["modulation"][0, 1, 2] = torch.nan
    states, *_ = eigenstate_scan_with_energy(ScanInputs(**inputs), "triton")
    assert states[0, 1:, 2].isnan().all()
    assert states[0, :, [0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("small_chunks")
def test_scan_takes_the_views_of_one_projection():
    """What a mixer passes: parts of a wider tensor, and a transposed one."""
    width, steps = 6, 5
    parts = torch.randn(2, steps, 5 * width, device=DEVICE)
    gradient = torch.randn(2, steps, 4 * width, device=DEVICE)[..., 1 : 1 + 2 * width]
    common = {
        "alpha": torch.linspace(-2, 5, width, device=DEVICE),
        "omega": torch.randn(width, device=DEVICE),
    }

    def results(beta, modulation, gradient):
        leaves = [t.detach().requires_grad_() for t in (beta, modulation)]
        states, final = eigenstate_scan(
            leaves[0], modulation=leaves[1], **common, backend="triton"
        )
        return states, final, *torch.autograd.grad(states, leaves, gradient)

    views = parts[..., : 2 * width], parts[..., 2 * width : 4 * width]
    swapped = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in views]
    across = [v.transpose(1, 2).contiguous().transpose(1, 2) for v in views]
    expected = results(*(v.contiguous() for v in views), gradient.contiguous())
    for beta, modulation in (views, swapped, across):
        actual = results(beta, modulation, gradient)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_result_alone(used):
    """Of the states, the final state or the energy; the others have no gradient."""
    inputs = make_inputs(7, 3, torch.float32, batch=1)
    gradients = []
    for backend, wide in (("triton", False), ("reference", True)):
        leaves = {
            n: (t.double() if wide else t.to(DEVICE)).requires_grad_()
            for n, t in inputs.items()
        }
        results = eigenstate_scan_with_energy(ScanInputs(**leaves), backend)
        loss = results[used].square().sum()
        gradients.append(
            dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        )
    assert_near(*gradients, TOLERANCE[torch.float32])


@pytest.mark.usefixtures("small_chunks")
def test_repetitions_are_identical():
    steps, width, repetitions = (3000, 70, 20) if ON_GPU else (9, 5, 2)
    inputs = on_device(make_inputs(steps, width, torch.float32, batch=2))
    first, *others = (run(inputs, "triton", "dynamic") for _ in range(repetitions))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.usefixtures("small_chunks")
def test_nothing_larger_than_its_results_is_kept():
    """For backward: the arguments and the states, which the caller holds anyway."""
    inputs = on_device(make_inputs(9, 8, torch.float32, batch=1))
    kept = []
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        states, *_ = eigenstate_scan_with_energy(ScanInputs(**leaves), "triton")
    held = {t.data_ptr() for t in inputs.values()} | {states.data_ptr()}
    large = [t for t in kept if t.numel() >= 9 * 8]
    assert large and all(t.data_ptr() in held for t in large)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("modulated", [True, False])
def test_operator_is_well_behaved_under_tracing(modulated):
    inputs = on_device(make_inputs(5, 3, torch.float32, batch=1, modulated=modulated))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    resets = make_resets(1, 5).to(DEVICE) if modulated else None
    arguments = ScanInputs(**leaves, resets=resets, input_norm="dynamic")
    operator = torch.ops.ten_dist_triton.scan_forward.default
    torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiled_function_has_one_graph(backend):
    inputs = on_device(make_inputs(5, 3, torch.float32, batch=1))
    beta = inputs.pop("beta").requires_grad_()
    ranges = inputs.pop("ranges")

    def loss(beta):
        both = as_ranges((ranges[0], 0.25), inputs["alpha"])
        states, _, energy = eigenstate_scan_with_energy(
            ScanInputs(beta, **inputs, ranges=both), backend
        )
        return states.sin().sum() + energy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(beta), beta)
    (actual,) = torch.autograd.grad(compiled(beta), beta)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@on_gpu_only
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("steps", "width"), [(1, 5), (64, 40), (1000, 33), (4097, 64), (20000, 16)]
)
def test_sizes_that_only_a_gpu_can_take(dtype, input_norm, steps, width):
    for modulated, initial in itertools.product([True, False], repeat=2):
        inputs = make_inputs(steps, width, dtype, modulated=modulated, initial=initial)
        # An error lasts as long as the memory of a decay of 0.9999.
        highest = 4.0 if dtype != torch.float32 or steps > 1000 else 10.0
        inputs["alpha"] = inputs["alpha"].clamp(max=highest)
        assert_equals_the_oracle(inputs, input_norm)
        assert_equals_the_oracle(inputs, input_norm, resets=make_resets(3, steps))


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_scan, "unavailable", lambda device_type: None)
    assert scan._fastest_on("cuda") == "triton"


def test_auto_says_why_it_does_not_take_triton(monkeypatch):
    monkeypatch.setattr(triton_scan, "unavailable", lambda device_type: "none today")
    scan.warn_of_slow_scan.cache_clear()
    with pytest.warns(UserWarning, match="slower than it could: none today"):
        assert scan._fastest_on("cuda") == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan._fastest_on("cuda") == "blocked"


def test_backend_is_listed_where_it_runs(monkeypatch):
    assert "triton" in available_backends()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ("triton" in available_backends()) == ON_GPU


def test_tensors_of_the_cpu_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton is not available: .* GPUs"):
        eigenstate_scan(
            torch.zeros(1, 2, 4), torch.zeros(2), torch.zeros(2), backend="triton"
        )


def test_float64_is_refused():
    tensors = (torch.zeros(*shape, device=DEVICE) for shape in ((1, 2, 4), (2,), (2,)))
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16"):
        eigenstate_scan(*(t.double() for t in tensors), backend="triton")


def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "cannot be imported" in triton_scan._unusable.__wrapped__("cpu")


def test_importing_the_library_does_not_import_triton():
    code = "import sys, ten_dist.recurrence; print('triton' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "False\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a process that does not interpret compiles for a GPU that need not be there."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    # Compiled here and now, not found.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("kernels"))
    result = subprocess.run(
        [sys.executable, "-m", "tests.tools.compiled_kernels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spilling(compiled):
    kinds = {kernel["name"].split()[0] for kernel in compiled["kernels"]}
    directions = ("forward", "backward")
    kernels = {f"{k}_{d}" for k in ("reduce", "scan") for d in directions}
    assert kinds == kernels | {"carry", "compose"}
    for kernel in compiled["kernels"]:
        assert kernel["stack_bytes"] == kernel["local_bytes"] == 0, kernel
        # What lets all 32 programs that a multiprocessor can hold be there at once.
        assert kernel["registers"] <= 64, kernel


@pytest.mark.slow
def test_other_lengths_and_batches_compile_nothing(compiled):
    assert compiled["more_for_other_sizes"] == 0


@pytest.mark.slow
def test_rows_may_be_far_apart(compiled):
    assert compiled["far_rows"] == ["i64", "i64"]

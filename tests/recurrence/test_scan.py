"""Every backend of the eigenstate scan against the oracle, forward and backward."""

import itertools

import pytest
import torch

from ten_dist.recurrence import available_backends, eigenstate_scan

# Backends that compute in float64 too; the others are in test_fast_backends.py.
EXACT_BACKENDS = ["blocked", "reference"]
FAST_BACKENDS = ["blocked"]
# Tensors here are the CPU's.
CPU_BACKENDS = [name for name in available_backends() if name != "triton"]
LENGTHS = (1, 2, 63, 64, 65, 1000)


def make_inputs(
    steps, *, batch=2, width=5, modulated=True, initial=True, strided=False
):
    """Leaf tensors of a scan in float64, decays from 0.05 to 0.9999."""
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    decay = torch.linspace(0.05, 0.9999, width, dtype=torch.float64)
    inputs = {
        "alpha": torch.logit(decay).requires_grad_(),
        "omega": normal(width),
        "beta": normal(batch, steps, 2 * width),
    }
    if strided:
        inputs["beta"] = normal(steps, 4 * width, batch)
    if modulated:
        inputs["modulation"] = normal(batch, steps, 2 * width)
    if initial:
        inputs["initial_state"] = normal(batch, 2 * width)
    return inputs


def run(inputs, backend, **options):
    """Outputs, and gradients of a loss that weighs every output differently."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    arguments = dict(leaves)
    if options.pop("strided", False):
        width = leaves["beta"].shape[1] // 2
        arguments["beta"] = leaves["beta"].permute(2, 0, 1)[..., 1 : 1 + width]
    states, final = eigenstate_scan(**arguments, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        for out in (states, final)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"states": states, "final": final, **dict(zip(leaves, gradients))}


def assert_equal_runs(inputs, backend, tolerance=1e-10, **options):
    expected = run(inputs, "reference", **options)
    actual = run(inputs, backend, **options)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
def test_backend_equals_oracle(backend, steps, input_norm):
    for modulated, initial in itertools.product([True, False], repeat=2):
        inputs = make_inputs(steps, modulated=modulated, initial=initial)
        assert_equal_runs(inputs, backend, input_norm=input_norm)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("selection_range", [(0.1, 0.1), (4.0, 0.5), (0.0, 0.0)])
def test_backend_equals_oracle_for_any_selection_range(backend, selection_range):
    assert_equal_runs(make_inputs(65), backend, selection_range=selection_range)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_takes_strided_inputs(backend):
    inputs = make_inputs(65, strided=True)
    assert_equal_runs(inputs, backend, strided=True)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("input_norm", ["none", "static", "dynamic"])
def test_gradients_agree_with_finite_differences(backend, input_norm):
    inputs = make_inputs(7, batch=1, width=3)
    names = list(inputs)
    # The steepest finite difference of sqrt(1 - rho^2) is near rho = 1.
    inputs["alpha"] = inputs["alpha"].detach().clamp(max=3.0).requires_grad_()

    def function(*tensors):
        return eigenstate_scan(
            **dict(zip(names, tensors)), input_norm=input_norm, backend=backend
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_state_carries_a_sequence_over_pieces(backend):
    inputs = {name: t.detach() for name, t in make_inputs(100).items()}
    whole, final = eigenstate_scan(**inputs, backend=backend)
    state, pieces = inputs["initial_state"], []
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, 100)):
        piece = dict(
            inputs,
            beta=inputs["beta"][:, start:stop],
            modulation=inputs["modulation"][:, start:stop],
            initial_state=state,
        )
        states, state = eigenstate_scan(**piece, backend=backend)
        pieces.append(states)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rounded_input_carries_a_float32_state(backend, dtype):
    inputs = make_inputs(200)
    low = {
        name: t.detach().to(dtype if name in ("beta", "modulation") else torch.float32)
        for name, t in inputs.items()
    }
    same_values = {name: t.double() for name, t in low.items()}
    states, final = eigenstate_scan(**low, backend=backend)
    _, expected = eigenstate_scan(**same_values, backend="reference")
    assert states.dtype == dtype
    assert final.dtype == torch.float32
    torch.testing.assert_close(final.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_energy_obeys_its_bound(backend):
    """Theorem 4: sqrt(E(t)) <= sqrt(E(0)) + t B where |lambda| <= 1, |g beta| <= B."""
    inputs = {name: t.detach() for name, t in make_inputs(300).items()}
    states, _ = eigenstate_scan(**inputs, backend=backend)
    root = states.square().sum(-1).sqrt()
    bound = inputs["beta"].square().sum(-1).sqrt().max()
    start = inputs["initial_state"].square().sum(-1).sqrt()
    steps = torch.arange(1, 301, dtype=torch.float64)
    assert (root <= start[:, None] + steps * bound).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.zeros(3)}, r"alpha must be \[5\]"),
        (
            {"modulation": torch.zeros(2, 7, 5)},
            r"modulation must be \[2, 8, 10\]",
        ),
        ({"initial_state": torch.zeros(2, 5)}, r"initial_state must be \[2, 10\]"),
        ({"beta": torch.zeros(2, 0, 10)}, "T >= 1"),
        ({"input_norm": "layer"}, "input_norm must be"),
        ({"backend": "cuda9"}, "unknown scan backend"),
        ({"backend": "cpu"}, "takes float32, bfloat16 and float16"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {**make_inputs(8), **change}
    with pytest.raises(ValueError, match=message):
        eigenstate_scan(**arguments)

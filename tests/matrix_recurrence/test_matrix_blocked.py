"""What is special about the chunks of the blocked matrix scan: decays of all sizes at once,
and what is kept."""

import pytest
import torch

from ten_dist.matrix_recurrence import MatrixScanInputs, matrix_blocked, matrix_scan
from tests.matrix_recurrence.matrix_comparison import (
    assert_near,
    make_matrix_inputs,
    make_resets,
    run_matrix,
    scan_of,
)


def with_logits(inputs, logits):
    """The inputs with these logits of the decay at each step, [T], by way of s_a = 8."""
    width = inputs["alpha"].shape[0]
    alpha = (logits.max() + logits.min()) / 2
    p = torch.atanh((logits - alpha) / 8).clamp(-10, 10).to(inputs["key"])
    modulation = inputs["modulation"].clone()
    modulation[..., :width] = p.view(1, -1, 1)
    ranges = torch.stack([torch.full((width,), 8.0), inputs["ranges"][1]])
    return inputs | {
        "alpha": torch.full((width,), float(alpha)),
        "ranges": ranges,
        "modulation": modulation,
    }


def assert_equals_the_oracle(inputs, tolerance, **options):
    actual = run_matrix(inputs, "blocked", **options)
    assert_near(
        actual, run_matrix(inputs, "reference", wide=True, **options), tolerance
    )


@pytest.mark.parametrize("slow", [0.0, 4.0])
def test_slow_steps_after_strong_decay_keep_their_digits(slow):
    """e^-12 a step for most of a chunk: a running sum would have lost what follows."""
    logits = torch.full((100,), -12.0)
    logits[25:32] = logits[60:] = slow
    inputs = with_logits(make_matrix_inputs(100, 3, 4, torch.float32), logits)
    actual = run_matrix(inputs, "blocked", input_norm="dynamic")
    expected = run_matrix(inputs, "reference", wide=True, input_norm="dynamic")
    assert_near(actual, {"outputs": expected["outputs"]}, 5e-6)
    assert_near(actual, expected, 1e-4)


def test_a_decay_within_1e_7_of_1_is_exact_over_long_sequences():
    """Rounded to float32, 0.99999994 or 1, it would be off by up to 1e-4 after 3000 steps."""
    inputs = make_matrix_inputs(3000, 1, 2, torch.float32, batch=1)
    inputs = with_logits(inputs, torch.full((3000,), 16.6))
    inputs["key"] = inputs["key"].abs()
    inputs["value"] = inputs["value"].abs()
    inputs["omega"].zero_()
    inputs["modulation"][..., 2:] = 0.0
    expected = run_matrix(inputs, "reference", wide=True)
    actual = run_matrix(inputs, "blocked")
    assert_near({"final": actual["final"]}, {"final": expected["final"]}, 3e-6)
    assert_near(actual, expected, 1e-4)


def test_several_pieces_equal_the_oracle_in_float64(monkeypatch):
    monkeypatch.setattr(matrix_blocked, "PIECE", 64)
    inputs = make_matrix_inputs(150, 3, 5, torch.float32)
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    assert_equals_the_oracle(
        inputs, 1e-11, input_norm="dynamic", resets=make_resets(3, 150)
    )


def test_what_is_not_finite_goes_where_the_recurrence_takes_it():
    inputs = make_matrix_inputs(90, 2, 3, torch.float32, batch=2)
    resets = torch.zeros(2, 90, dtype=torch.bool)
    resets[0, [20, 60]] = resets[1, 7] = True
    inputs["key"][0, 5, 1] = inputs["modulation"][0, 40, 2] = torch.nan
    inputs["value"][0, 3, 4] = torch.inf
    inputs["initial_state"][1, 1] = inputs["query"][1, 50, 0] = torch.nan
    actual, expected = (
        scan_of(inputs, name, resets=resets) for name in ("blocked", "reference")
    )
    # Of a head all values are taken to be reached.
    for result, size in (("outputs", 3), ("final", 6)):
        marked = [
            r[result].isfinite().unflatten(-1, (-1, size)) for r in (actual, expected)
        ]
        assert torch.equal(marked[0].all(dim=-1), marked[1].all(dim=-1))
        assert torch.equal(marked[0].all(dim=-1), marked[0].any(dim=-1))


def test_the_arguments_and_what_enters_each_piece_are_kept(monkeypatch):
    monkeypatch.setattr(matrix_blocked, "PIECE", 64)
    inputs = make_matrix_inputs(200, 6, 20, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    held = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        matrix_scan(MatrixScanInputs(**leaves, num_heads=2), "blocked")
    new = [t for pointer, t in kept.items() if pointer not in held and t.numel() > 1000]
    assert sum(t.numel() for t in new if t.is_floating_point()) <= 4 * 3 * 2 * 12 * 20

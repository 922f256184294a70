"""What only the C++ operator of the matrix scan promises, and how it is chosen."""

import pytest
import torch

from ten_dist.matrix_recurrence import MatrixScanInputs, available_backends, matrix_scan
from tests.matrix_recurrence.matrix_comparison import (
    make_matrix_inputs,
    make_resets,
    scan_of,
)

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="there is no C++ compiler"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_operator(dtype):
    inputs = make_matrix_inputs(20, 6, 20, dtype)
    results, expected = (scan_of(inputs, name) for name in ("auto", "cpu"))
    assert all(torch.equal(results[name], expected[name]) for name in results)


def test_float64_is_not_for_the_operator():
    inputs = {
        name: tensor.double()
        for name, tensor in make_matrix_inputs(20, 6, 20, torch.float32).items()
    }
    assert scan_of(inputs, "auto")["final"].dtype == torch.float64
    with pytest.raises(ValueError, match="backend cpu cannot run: it takes float32"):
        scan_of(inputs, "cpu")


def test_an_unknown_name_is_told_beside_those_that_are_known():
    with pytest.raises(ValueError, match="this machine has auto, .*cpu, .*reference"):
        scan_of(make_matrix_inputs(2, 6, 20, torch.float32), "cuda")


def test_a_state_in_64_steps_is_kept():
    """For backward, beside the arguments."""
    inputs = make_matrix_inputs(200, 6, 20, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    held = {tensor.data_ptr() for tensor in leaves.values()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        matrix_scan(MatrixScanInputs(**leaves, num_heads=2), "cpu")
    new = [tensor for tensor in kept if tensor.data_ptr() not in held]
    assert [tensor.shape for tensor in new] == [(3, 3, 2 * 12 * 20)]


@pytest.mark.slow
def test_operator_is_well_behaved_under_tracing():
    inputs = make_matrix_inputs(70, 6, 5, torch.float32, batch=2)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    for resets in (None, make_resets(2, 70)):
        arguments = MatrixScanInputs(
            **leaves, num_heads=2, resets=resets, input_norm="dynamic"
        )
        operator = torch.ops.ten_dist_cpu.matrix_scan_forward.default
        torch.library.opcheck(operator, tuple(arguments))

"""A backend of the matrix scan beside the oracle: inputs, results with all gradients, errors."""

import torch

from benchmarks.scan_comparison import TOLERANCE, assert_near, make_resets
from ten_dist.matrix_recurrence import MatrixScanInputs, matrix_scan

__all__ = [
    "SEQUENCES",
    "TOLERANCE",
    "assert_near",
    "make_matrix_inputs",
    "make_resets",
    "run_matrix",
    "scan_of",
]
NAMES = ("outputs", "final", "energy")
SEQUENCES = ("key", "query", "value", "modulation")


def make_matrix_inputs(
    steps,
    eigenstates,
    numbers,
    dtype,
    *,
    heads=2,
    batch=3,
    initial=True,
    longest_memory=1e4,
):
    """Real tensors of MatrixScanInputs, rounded to `dtype`, of `eigenstates` a head that
    carry `numbers` each; memories from 1.05 steps to the longest."""
    generator = torch.Generator().manual_seed(steps * 100 + eigenstates + numbers)
    width = heads * eigenstates

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    memories = torch.logspace(0.02, torch.tensor(longest_memory).log10().item(), width)
    inputs = {
        "key": normal(batch, steps, 2 * width).to(dtype),
        "query": normal(batch, steps, 2 * width).to(dtype),
        "value": normal(batch, steps, heads * numbers).to(dtype),
        "alpha": (memories - 1).log(),
        "omega": normal(width, scale=3.0),
        "ranges": torch.stack(
            [torch.full((width,), 0.5), normal(width, scale=2.0).abs()]
        ),
        "modulation": normal(batch, steps, 2 * width, scale=2.0).to(dtype),
    }
    if initial:
        inputs["initial_state"] = normal(batch, 2 * width * numbers)
    return inputs


def scan_of(inputs, backend, heads=2, **options):
    """Results of `matrix_scan` by name."""
    scan_inputs = MatrixScanInputs(**inputs, num_heads=heads, **options)
    return dict(zip(NAMES, matrix_scan(scan_inputs, backend), strict=True))


def run_matrix(inputs, backend, *, wide=False, **options):
    """Results and all gradients of a loss that weighs every result differently; `wide` in
    float64."""
    leaves = {
        name: (tensor.double() if wide else tensor).detach().clone().requires_grad_()
        for name, tensor in inputs.items()
    }
    results = scan_of(leaves, backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for name, scale in zip(NAMES, (1.0, 1.0, 1e-2), strict=True):
        weight = scale * torch.randn(results[name].shape, generator=generator)
        if name == "outputs":
            # The gradient of the outputs has their dtype.
            weight = weight.to(inputs["key"].dtype)
        loss = loss + (results[name].double() * weight).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return results | {
        f"grad {name}": gradient
        for name, gradient in zip(leaves, gradients, strict=True)
    }

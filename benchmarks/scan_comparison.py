"""A backend of the scan beside the oracle: inputs, results with all gradients, errors."""

import torch

from ten_dist.recurrence import ScanInputs, eigenstate_scan_with_energy

NAMES = ("states", "final", "energy")
# Largest error of each result relative to its largest value.
# float16 has three bits more than bfloat16.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def make_inputs(steps, width, dtype, *, batch=3, modulated=True, initial=True):
    """Inputs rounded to `dtype`; decays from 0.05 to 0.9999."""
    generator = torch.Generator().manual_seed(steps * 100 + width)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    inputs = {
        "beta": normal(batch, steps, 2 * width).to(dtype),
        "alpha": torch.logit(torch.linspace(0.05, 0.9999, width)),
        "omega": normal(width, scale=3.0),
        "ranges": torch.stack(
            [torch.full((width,), 0.5), normal(width, scale=2.0).abs()]
        ),
    }
    if modulated:
        inputs["modulation"] = normal(batch, steps, 2 * width, scale=2.0).to(dtype)
    if initial:
        inputs["initial_state"] = normal(batch, 2 * width)
    return inputs


def make_resets(batch, steps):
    """Resets, [B, T]: in the first row many, one after the other too, and at both ends;
    in the last none before the state that it starts from has been of use."""
    generator = torch.Generator().manual_seed(steps)
    shares = torch.linspace(0.5, 0.02, batch).unsqueeze(1)
    resets = torch.rand(batch, steps, generator=generator) < shares
    resets[0, [0, -1]] = True
    resets[-1, : (steps + 1) // 2] = False
    return resets


def run(inputs, backend, input_norm, wide=False, resets=None):
    """Results and all gradients of a loss that weighs every result differently."""
    leaves = {
        name: (tensor.double() if wide else tensor).detach().clone().requires_grad_()
        for name, tensor in inputs.items()
    }
    scan_inputs = ScanInputs(**leaves, input_norm=input_norm, resets=resets)
    results = eigenstate_scan_with_energy(scan_inputs, backend)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for result, scale in zip(results, (1.0, 1.0, 1e-2)):
        weight = scale * torch.randn(result.shape, generator=generator)
        loss = loss + (result * weight.to(result)).double().sum()
    # Without modulation the selection ranges play no part.
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(NAMES, results)) | {
        f"grad {name}": gradient for name, gradient in zip(leaves, gradients)
    }


def assert_near(actual, expected, tolerance):
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        error = (actual[name].double().cpu() - value).abs().max() / scale
        assert error < tolerance, (name, error.item())

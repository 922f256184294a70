"""Floating-point operations of a training step, counted from the model itself."""

from __future__ import annotations

from torch import nn

from ten_dist.model.attention import CausalSelfAttention
from ten_dist.model.hierarchy import MixedScale
from ten_dist.model.mixer import RECURRENCE_PARAMETERS

# Dense bfloat16 matrix products, by what torch calls the GPU. The same chips on PCIe
# cards and in pairs ("NVL") run slower and are not meant.
_PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H200": 989.5,
    "NVIDIA GH200 120GB": 989.5,
    "NVIDIA GH200 480GB": 989.5,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by its data sheet, or None where not known here."""
    return _PEAK_TFLOPS.get(device_name)


def training_flops_per_token(model: nn.Module, steps: int) -> float:
    """Operations of forward and backward for one token of a sequence of `steps`.

    6 for each element of each matrix that a token is multiplied with: all weights of the
    blocks, those of scale s of a hierarchy at its rate, 1/s, and the head. Not counted:
    the embedding, which is looked up; the coupling of the eigenstates, which multiplies a
    weight once a step; norms, biases and the scan, a few operations a number; and what
    checkpointing computes again.

    Attention adds its two products with the (steps + 1) / 2 positions that a token sees
    on average.
    """
    rate: dict[int, float] = {}
    attention = 0.0
    for module in model.modules():
        if isinstance(module, MixedScale):
            rate |= {id(p): 1 / module.scale for p in module.parameters()}
        elif isinstance(module, CausalSelfAttention):
            # Forward 2 products of 2 operations an element, backward twice that.
            attention += 12 * module.output_weight.shape[0] * (steps + 1) / 2
    # The head is the embedding, which named_parameters() names once. Vectors are norms,
    # biases and eigenvalues.
    matrices = sum(
        parameter.numel() * rate.get(id(parameter), 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.split(".")[-1] not in RECURRENCE_PARAMETERS
    )
    return 6 * matrices + attention

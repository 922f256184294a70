"""Linear maps by the fastest library that torch brings for them.

In float32 on CPUs torch takes them to MKL, whose float32 products use half of an AMD
processor. The kernels of oneDNN, which torch takes every other dtype to, are up to twice
as fast there. On Intel's processors MKL's are a tenth faster, and stay.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST_ROWS = 64
"""Below that, as in generation, finding the kernel takes longer than the product."""


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: inputs [..., d] @ weight [m, d].T + bias [m]."""
    if inputs.numel() >= _FEWEST_ROWS * inputs.shape[-1] and takes_onednn(
        inputs, weight
    ):
        return _OneDNNLinear.apply(inputs.flatten(0, -2), weight, bias).unflatten(
            0, inputs.shape[:-1]
        )
    return F.linear(inputs, weight, bias)


def takes_onednn(*factors: Tensor) -> bool:
    """Whether products of these tensors are to be taken with :func:`product`.

    Not in a graph that is being compiled, whose compiler chooses for itself.
    """
    return (
        not torch.compiler.is_compiling()
        and is_made_by_amd()
        and all(f.dtype == torch.float32 and f.device.type == "cpu" for f in factors)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def is_made_by_amd() -> bool:
    """Whether this machine's processor is, as far as Linux tells."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(
            encoding="utf-8", errors="replace"
        )
    except OSError:
        return False


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [n, k] @ b [k, m] + bias [m] by oneDNN, float32, any strides; without autograd."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """grad [n, m].T @ inputs [n, d] by oneDNN, [m, d] of any strides.

    oneDNN copies a first factor that is transposed: let it be the smaller one.
    """
    if grad.shape[1] > inputs.shape[1]:
        return product(inputs.T, grad).T
    return product(grad.T, inputs)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight.T, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs, weight = ctx.saved_tensors
        need_inputs, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if need_inputs else None,
            weight_gradient(grad, inputs).contiguous() if need_weight else None,
            grad.sum(dim=0) if need_bias else None,
        )

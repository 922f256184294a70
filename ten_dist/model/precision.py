"""The precision of training, and where it must not reach."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which a model computes as `--precision` says.

    With bf16_params it serves where a float32 value, such as the folded coupling, meets
    a bfloat16 parameter.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products keep the dtype of their factors."""
    if device.type == "meta":
        # It has no autocast to switch off.
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)

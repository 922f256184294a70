"""Where the precision of training must not reach."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

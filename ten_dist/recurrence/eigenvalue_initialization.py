"""Initial eigenvalues (docs/model.md#scan).

1 / (1 - sigmoid(alpha)) = 1 + e^alpha, so alpha is a log time scale: eigenstate k
remembers about 1 + e^alpha_k steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def initial_eigenvalues(
    num_eigenstates: int, kind: str, max_timescale: float = 2048.0
) -> tuple[Tensor, Tensor]:
    """Base decay logits alpha and rotations omega of K eigenstates.

    Args:
        num_eigenstates: K.
        kind: "paper" draws alpha ~ U(-3, 0), memories of 1.05 to 2 steps, from torch's
            global generator, and sets omega_k = 2 pi k / K. "timescale" spreads the
            memories log-uniformly from 1 to `max_timescale` steps; rotations cover the
            circle where the memory is short and slow down in proportion to it, so that
            an eigenstate turns a few times at most within its own memory.
        max_timescale: longest memory of "timescale", in steps, more than 1.

    Returns:
        alpha, omega: [K] float32.

    Raises:
        ValueError: `kind` is unknown.
    """
    # NumPy: under `deepspeed.zero.Init` torch's constructors give the training dtype.
    index = np.arange(num_eigenstates)
    if kind == "paper":
        alpha = torch.rand(num_eigenstates, device="cpu").numpy() * 3 - 3
        omega = 2 * math.pi * index / num_eigenstates
    elif kind == "timescale":
        # Midpoints of K equal parts of [log 1, log max]: memory 1 itself is alpha = -inf.
        log_memory = math.log(max_timescale) * (index + 0.5) / num_eigenstates
        alpha = np.log(np.expm1(log_memory))
        # Golden-ratio steps keep angles of neighbouring memories apart for any K.
        angle = math.pi * (2 * np.remainder(index / _GOLDEN_RATIO, 1.0) - 1)
        omega = angle * np.minimum(4.0 / np.exp(log_memory), 1.0)
    else:
        raise ValueError(f"eigenvalue_init must be paper or timescale, not {kind!r}")
    return torch.from_numpy(alpha).float(), torch.from_numpy(omega).float()

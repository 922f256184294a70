"""Initial values of weights, the same for every device and ZeRO stage.

Modules initialise their own parameters in their own constructor, never in a pass over
a finished model: such a pass overwrites the special values of the recurrence, and under
`deepspeed.zero.Init` a parameter is sharded as soon as its module's constructor ends.
Values are drawn on the CPU, so that the same seed gives the same model everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnValues:
    """For a module of torch whose weight has initial values of ours.

    Torch's own are drawn first, as what is drawn afterwards depends on it; but not on the
    meta device, where torch would import its compiler for that: two seconds of a start.
    """

    weight: Tensor

    def reset_parameters(self) -> None:
        """Draw torch's own initial values, where there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()  # type: ignore[misc]  # of the module beside this


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float) -> None:
    """Set `parameter` to N(0, std^2); nothing happens on the meta device."""
    if not parameter.is_meta:
        parameter.copy_(torch.randn(parameter.shape, device="cpu") * std)


@torch.no_grad()
def fill_orthonormal(parameter: Tensor) -> None:
    """Set a matrix to orthonormal rows or columns, whichever are fewer (QR)."""
    if not parameter.is_meta:
        # Not of the parameter's dtype: there is no QR in bfloat16.
        values = torch.empty(parameter.shape, device="cpu").float()
        parameter.copy_(nn.init.orthogonal_(values))

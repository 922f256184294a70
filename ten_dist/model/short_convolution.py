"""Short causal convolution of the mixer's input, one filter a channel.

An eigenstate sums its inputs with weights that fall slowly; it cannot tell "ab" from "ba"
a few tokens ago. A filter over the last few tokens can, and leaves the long range to the
eigenstates (Mamba and Griffin place the same convolution before their recurrences).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ten_dist.model.document_starts import document_numbers


class ShortConvolution(nn.Module):
    """v_t = sum_i f_i * u_{t-i}, 0 <= i < width, with zeros before the start.

    With document masking the zeros reach up to the start of the document of t. It starts
    as the identity: f_0 = 1, all others 0.

    Args:
        dim: channels d.
        width: tokens that one output sees, its own included.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.filter = nn.Parameter(torch.zeros(width, dim))
        with torch.no_grad():
            self.filter[0] = 1.0

    def forward(
        self, inputs: Tensor, past: Tensor | None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Filter a sequence, or a piece of one.

        Args:
            inputs: [B, T, d].
            past: [B, width - 1, d], the inputs before these, or None at the start.
            resets: [B, T] bool, where documents start, to keep them apart.

        Returns:
            outputs: [B, T, d]; past: for the piece that follows.
        """
        batch, steps, dim = inputs.shape
        before = self.width - 1
        if past is None:
            past = inputs.new_zeros(batch, before, dim)
        extended = torch.cat([past.to(inputs.dtype), inputs], dim=1)
        weights = self.filter.to(inputs.dtype)
        outputs = weights[0] * inputs
        if resets is not None:
            numbers = document_numbers(resets)
            known = F.pad(numbers, (before, 0))
        for lag in range(1, self.width):
            first = before - lag
            lagged = extended[:, first : first + steps]
            if resets is not None:
                foreign = known[:, first : first + steps] != numbers
                lagged = lagged.masked_fill(foreign.unsqueeze(-1), 0.0)
            outputs = outputs + weights[lag] * lagged
        # A copy: a view would keep the whole sequence alive.
        past = extended[:, steps:].clone()
        if resets is not None:
            foreign = known[:, steps:] != numbers[:, -1:]
            past = past.masked_fill(foreign.unsqueeze(-1), 0.0)
        return outputs, past

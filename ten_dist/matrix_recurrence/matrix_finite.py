"""What is not a finite number, beside matrix products that would spread it.

A product with a triangular matrix multiplies what comes later, or lies behind a reset, with
0, and 0 times NaN is NaN. Backends that are made of such products read what is not finite
as 0, and are told here where the recurrence would have carried it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs


def with_not_a_number(
    inputs: MatrixScanInputs, output: Tensor, final_state: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `matrix_scan` for inputs in which 0 stands for what is not finite.

    They are made NaN from a step on at which key, value or modulation of a head is not
    finite, up to the next reset; for the whole head, and so for a state to start from. A
    query makes the output of its own step NaN.
    """
    heads, reached = inputs.num_heads, _reached(inputs)
    query = inputs.query.detach().unflatten(-1, (2, -1))

    def marked(result: Tensor, where: Tensor, *shape: int) -> Tensor:
        by_head = result.unflatten(-1, (*shape, heads, -1))
        return by_head.masked_fill(where.unsqueeze(-1), torch.nan).view_as(result)

    return (
        marked(output, reached | ~_largest(query, heads).isfinite()),
        marked(final_state, reached[:, -1:], 2),
        marked(energy, reached.any(dim=1)),
    )


@torch.no_grad()
def _reached(inputs: MatrixScanInputs) -> Tensor:
    """[B, T, H], whether something not finite has reached the state of a head."""
    heads = inputs.num_heads
    largest = _largest(inputs.value.unsqueeze(-2), heads)
    for halves in (inputs.key, inputs.modulation):
        largest = largest + _largest(halves.unflatten(-1, (2, -1)), heads)
    wrong = ~largest.isfinite()
    steps = torch.arange(wrong.shape[1], device=wrong.device).view(1, -1, 1)
    # The last step that was wrong: -1 is the state before the first, -2 none.
    last = torch.where(wrong, steps, -2)
    if inputs.initial_state is not None:
        initial = inputs.initial_state.view(len(wrong), 1, 2, -1)
        last = last.maximum(torch.where(_largest(initial, heads).isfinite(), -2, -1))
    last = last.cummax(dim=1).values
    if inputs.resets is None:
        return last >= -1
    resets = torch.where(inputs.resets.unsqueeze(-1), steps, -1).cummax(dim=1).values
    return last >= resets


def _largest(halves: Tensor, heads: int) -> Tensor:
    """[..., H], largest magnitude of a head in [..., halves, H ..], float32 or float64; NaN
    if there is one."""
    by_head = halves.unflatten(-1, (heads, -1))
    return torch.linalg.vector_norm(by_head, ord=torch.inf, dim=(-3, -1))

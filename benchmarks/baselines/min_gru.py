"""minGRU: a recurrence of real numbers, gated by the input alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.baselines.layers import Projection


class MinGRU(nn.Module):
    """minGRU (Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201, section 3.1).

        z_t = sigmoid(W_z x_t)
        h_t = (1 - z_t) * h_{t-1} + z_t * W_h x_t          h_{-1} = 0
        o_t = W_o h_t

    Args:
        dim: width d.
        inner: states of a layer, d times the paper's factor of expansion.
        std: of the initial output matrix.
    """

    def __init__(self, dim: int, inner: int, std: float) -> None:
        super().__init__()
        self.input = Projection(dim, inner, inner)
        self.output = Projection(inner, dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, proposed = self.input(inputs).float().chunk(2, dim=-1)
        keep = torch.sigmoid(-gate)
        return self.output(linear_scan(keep, (1 - keep) * proposed).to(inputs.dtype))


def linear_scan(decay: Tensor, inputs: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t from h_{-1} = 0; all are [B, T, n] of one dtype."""
    return _LinearScan.apply(decay, inputs)


class _LinearScan(torch.autograd.Function):
    """The recurrence step by step, each step for all rows and states at once.

    That reads each number once, where doubling would log2 T times: on a CPU it is the
    faster of the two.
    """

    @staticmethod
    def forward(ctx, decay: Tensor, inputs: Tensor) -> Tensor:
        # Steps lie one behind the other, so that each is one stretch of memory.
        decay = decay.transpose(0, 1).contiguous()
        states = inputs.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for step in range(1, len(states)):
            states[step].addcmul_(decay[step], states[step - 1])
        ctx.save_for_backward(decay, states)
        return states.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """a_t = grad_t + decay_{t+1} a_{t+1}; d inputs_t = a_t; d decay_t = a_t h_{t-1}."""
        decay, states = ctx.saved_tensors
        adjoint = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for step in range(len(adjoint) - 2, -1, -1):
            adjoint[step].addcmul_(decay[step + 1], adjoint[step + 1])
        decay_grad = torch.zeros_like(decay)
        torch.mul(adjoint[1:], states[:-1], out=decay_grad[1:])
        return decay_grad.transpose(0, 1), adjoint.transpose(0, 1)

"""Mixers whose heads carry a matrix from token to token: Mamba-2 and gated delta net.

Both are computed in chunks: within a chunk by products of [chunk, chunk] matrices, between
chunks by the state. The result is that of the recurrence, to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.layers import Projection
from ten_dist.model.precision import without_autocast
from ten_dist.model.short_convolution import ShortConvolution

CHUNK = 64
CONVOLUTION = 4


def chunked_states(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    strength: Tensor | None = None,
) -> Tensor:
    """What queries read from a matrix S [n, p] that decays and takes outer products.

        S_t = e^{log_decay_t} S_{t-1} + k_t u_t^T            S_{-1} = 0
        o_t = S_t^T q_t

    Without `strength` u = v (Mamba-2: Dao and Gu, arXiv 2405.21060, section 6, the block
    decomposition of the semiseparable matrix). With it the delta rule,

        u_t = strength_t (v_t - e^{log_decay_t} S_{t-1}^T k_t)

    whose u of a chunk solve a triangular system (the WY form of Yang, Kautz and
    Hatamizadeh, arXiv 2412.06464, section 3.3). With g_t the sum of log_decay from the start
    of the chunk to t and S the state before it:

        (I + A) U = strength (V - e^g K S)        A_ts = strength_t e^{g_t - g_s} k_t . k_s, s < t

    Args:
        queries, keys: [B, H, T, n] float32; or [B, 1, T, n], shared by the heads.
        values: [B, H, T, p] float32.
        log_decay, strength: [B, H, T] float32.

    Returns:
        [B, H, T, p] float32.
    """
    with without_autocast(values.device):
        return _chunk_by_chunk(queries, keys, values, log_decay, strength)


def _chunk_by_chunk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    strength: Tensor | None,
) -> Tensor:
    batch, heads, _, width = values.shape
    state = values.new_zeros(batch, heads, keys.shape[-1], width)
    outputs = []
    for start in range(0, values.shape[2], CHUNK):
        chunk = slice(start, start + CHUNK)
        q, k, u = queries[:, :, chunk], keys[:, :, chunk], values[:, :, chunk]
        total = log_decay[:, :, chunk].cumsum(dim=2).unsqueeze(-1)
        # Masked before it is raised: later steps would overflow.
        between = (total - total.mT).tril().exp().tril()
        if strength is not None:
            beta = strength[:, :, chunk].unsqueeze(-1)
            u = torch.linalg.solve_triangular(
                (beta * between * (k @ k.mT)).tril(-1),
                beta * (u - total.exp() * (k @ state)),
                upper=False,
                unitriangular=True,
            )
        outputs.append(total.exp() * (q @ state) + (between * (q @ k.mT)) @ u)
        last = total[:, :, -1:]
        state = last.exp() * state + ((last - total).exp() * k).mT @ u
    return torch.cat(outputs, dim=2)


class _Decay(nn.Module):
    """Decay of each head, from its input: log a_t = -e^A softplus(W x_t + b), and the softplus.

    Initial values are Mamba-2's: e^A uniform from 1 to 16, and the softplus at W x = 0
    log-uniform from 0.001 to 0.1.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        step = 10 ** torch.empty(num_heads).uniform_(-3, -1)
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        # Of so few rows that orthogonal updates of Muon would mean nothing: no matrix.
        self.weight = nn.Parameter(torch.zeros(num_heads, dim))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, d] -> log decay and step, [B, H, T] float32 each."""
        raw = F.linear(inputs, self.weight).float() + self.bias
        step = F.softplus(raw).transpose(1, 2)
        return -self.log_rate.exp().unsqueeze(-1) * step, step


class Mamba2(nn.Module):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060, section 7.1, figure 6): state space duality.

        [x, B, C] = silu(conv(W_xBC u)), z = W_z u, delta = softplus(W_delta u + b)
        S_t = e^{-A delta_t} S_{t-1} + B_t (delta_t x_t)^T,  y_t = S_t^T C_t + D x_t
        o_t = W_o RMSNorm(y_t * silu(z_t))

    A, D and delta are one number a head; B and C are those of all heads.

    Args:
        dim: width d.
        inner: widths of x of all heads together.
        num_heads: H, which divides `inner`.
        state_dim: width of B and C.
        std: of the initial output matrix.
    """

    def __init__(
        self, dim: int, inner: int, num_heads: int, state_dim: int, std: float
    ) -> None:
        super().__init__()
        self.sizes, self.num_heads = (inner, inner, state_dim, state_dim), num_heads
        self.input = Projection(dim, *self.sizes)
        self.convolution = ShortConvolution(inner + 2 * state_dim, CONVOLUTION)
        self.decay = _Decay(dim, num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.norm = nn.RMSNorm(inner)
        self.output = Projection(inner, dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, rest = self.input(inputs).tensor_split(self.sizes[:1], dim=-1)
        rest = F.silu(self.convolution(rest, None)[0]).float()
        x, keys, queries = rest.split(self.sizes[1:], dim=-1)
        x = _heads(x, self.num_heads)
        log_decay, step = self.decay(inputs)
        states = chunked_states(
            queries.unsqueeze(1), keys.unsqueeze(1), step.unsqueeze(-1) * x, log_decay
        )
        y = (states + self.skip * x).transpose(1, 2).flatten(-2)
        return self.output(self.norm(y * F.silu(gate)))


class GatedDeltaNet(nn.Module):
    """Gated delta net (Yang, Kautz and Hatamizadeh, arXiv 2412.06464, equation 10, figure 1).

        [q, k, v] = silu(conv(W_qkv u)), q and k of length 1;  beta_t = sigmoid(W_beta u)
        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  y_t = S_t^T q_t
        o_t = W_o (RMSNorm_head(y_t) * silu(W_z u))

    with a_t of Mamba-2. With `negative_eigenvalues` beta reaches up to 2, so that
    I - beta k k^T can be a reflection (Grazzi et al., arXiv 2411.12537, section 4).

    Args:
        dim: width d.
        inner: widths of v of all heads together.
        num_heads: H, which divides `inner`.
        state_dim: width of q and k of a head.
        std: of the initial output matrix.
        negative_eigenvalues: see above.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        num_heads: int,
        state_dim: int,
        std: float,
        negative_eigenvalues: bool,
    ) -> None:
        super().__init__()
        width = num_heads * state_dim
        self.sizes, self.num_heads = (inner, width, width, inner), num_heads
        self.largest_strength = 2.0 if negative_eigenvalues else 1.0
        self.input = Projection(dim, *self.sizes)
        self.convolution = ShortConvolution(inner + 2 * width, CONVOLUTION)
        self.decay = _Decay(dim, num_heads)
        self.strength = nn.Parameter(torch.zeros(num_heads, dim))
        self.norm = nn.RMSNorm(inner // num_heads)
        self.output = Projection(inner, dim, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, rest = self.input(inputs).tensor_split(self.sizes[:1], dim=-1)
        rest = F.silu(self.convolution(rest, None)[0]).float()
        queries, keys, values = (
            _heads(part, self.num_heads) for part in rest.split(self.sizes[1:], dim=-1)
        )
        strength = torch.sigmoid(F.linear(inputs, self.strength).float())
        log_decay, _ = self.decay(inputs)
        states = chunked_states(
            F.normalize(queries, dim=-1),
            F.normalize(keys, dim=-1),
            values,
            log_decay,
            self.largest_strength * strength.transpose(1, 2),
        )
        y = self.norm(states.transpose(1, 2)).flatten(-2)
        return self.output(y * F.silu(gate))


def _heads(values: Tensor, num_heads: int) -> Tensor:
    """[B, T, H w] -> [B, H, T, w]."""
    return values.unflatten(-1, (num_heads, -1)).transpose(1, 2)

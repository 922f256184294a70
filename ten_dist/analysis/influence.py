"""How far back a network looks: the effect of a token on later ones, by gradients."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.places import as_array
from ten_dist.model import TemporalEigenstateNetwork

_PROBES = 4


@dataclasses.dataclass(frozen=True)
class Influence:
    """How much of what is known at a position comes from how far before it.

    Were the embeddings of all tokens moved a little, each independently and alike, the
    hidden state at the end of a row would move; what of its variance comes from a token
    n before the end is the influence at lag n.
    """

    by_lag: np.ndarray
    """[T] float64, at lags 0 to T - 1; the sum is 1, unless nothing has any."""

    def lag_of_share(self, share: float) -> int | None:
        """The least lag up to which the tokens before the last have this share of their
        influence; None where they have none."""
        past = np.cumsum(self.by_lag[1:])
        if past.size == 0 or not past[-1] > 0:
            return None
        return 1 + int(np.searchsorted(past, share * past[-1]))


def measure_influence(
    network: TemporalEigenstateNetwork, rows: HeldOutRows, seed: int = 0
) -> Influence:
    """Measure at the last position of each row, by the gradients of some random
    projections of the hidden state by the embeddings.

    Args:
        network: the model.
        rows: their length bounds the lags.
        seed: of the projections.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(rows.inputs.shape[1], dtype=torch.float64)
    for batch in rows.batches():
        embeddings, hidden = _last_hidden(network, batch.inputs)
        for probe in range(_PROBES):
            direction = torch.randn(hidden.shape, generator=generator).to(hidden)
            (gradient,) = torch.autograd.grad(
                (hidden * direction).sum(),
                embeddings,
                retain_graph=probe < _PROBES - 1,
            )
            power = gradient.double().square().sum(dim=(0, 2))
            total += power.flip(0).cpu()
    by_lag = as_array(total)
    whole = by_lag.sum()
    return Influence(by_lag / whole if whole > 0 else by_lag)


@torch.enable_grad()
def _last_hidden(
    network: TemporalEigenstateNetwork, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T, d], and the normed hidden state of the last position, [B, 1, d],
    with the graph between them."""
    seen: dict[str, Tensor] = {}

    def embed(_module: object, _arguments: object, output: Tensor) -> Tensor:
        seen["embeddings"] = output.detach().requires_grad_()
        return seen["embeddings"]

    def keep(_module: object, _arguments: object, output: Tensor) -> None:
        seen["hidden"] = output

    with contextlib.ExitStack() as stack:
        stack.callback(network.embedding.register_forward_hook(embed).remove)
        stack.callback(network.final_norm.register_forward_hook(keep).remove)
        network(inputs, last_only=True)
    return seen["embeddings"], seen["hidden"]

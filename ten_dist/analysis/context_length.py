"""The held-out loss against how much context is given."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from ten_dist.analysis.places import as_array
from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data import BatchShape, Manifest, evaluation_batches
from ten_dist.model import TemporalEigenstateNetwork

SHORTEST, LONGEST = 16, 32768
"""Contexts that are given, in tokens: powers of two from the first to the second."""
SCORED = 16
"""Targets that are scored at each place: the last one has 15 tokens of context more."""
_MOST_PLACES = 256
_FEWEST_PLACES = 4
_PIECE = 8192


@dataclasses.dataclass(frozen=True)
class ContextLoss:
    """The loss with a context, beside that with half of it on the same targets."""

    context: int
    """Tokens before the first scored target."""
    loss: float
    """Nats a token: that of the shortest context plus all changes up to this one."""
    change: float
    """From half of this context to this one, nats a token; 0 of the shortest."""
    standard_error: float
    """Of the change, as far as it comes from which places were drawn."""
    targets: int
    """Scored targets."""


def where_it_stops(losses: list[ContextLoss]) -> int | None:
    """The context behind which no doubling lowers the loss by more than two standard
    errors; None where the longest one that was measured still does."""
    falls = [loss.change < -2 * loss.standard_error for loss in losses[1:]]
    if not losses or (falls and falls[-1]):
        return None
    last = max((i for i, falling in enumerate(falls, start=1) if falling), default=0)
    return losses[last].context


def measure_context(
    network: TemporalEigenstateNetwork, manifest: Manifest, tokens: int
) -> list[ContextLoss]:
    """Measure at random places of the start of a token set.

    The same targets are scored with each context and its half, so that what is easy about
    a place cancels out of the change. Longer contexts are measured at fewer places.

    Args:
        network: the model.
        manifest: of the set.
        tokens: to read for each context, which bounds the work, but for long ones at least
            at 4 places; 0 measures nothing. A context of which the set has not two is left
            out.

    Returns:
        By context, from the shortest; empty where there is none.
    """
    stream, targets = _start_of(manifest, 2 * max(tokens, LONGEST))
    contexts = [2**n for n in range(4, 16) if 2**n <= min(LONGEST, len(stream) // 2)]
    if not contexts or tokens == 0:
        return []
    blocks = np.arange(contexts[-1] // SCORED, len(stream) // SCORED)
    drawn = np.random.default_rng(0).permutation(blocks)[:_MOST_PLACES] * SCORED
    counted = (targets != IGNORED_TARGET).numpy()
    order = [p for p in drawn.tolist() if counted[p : p + SCORED].any()]
    found: list[ContextLoss] = []
    before = np.empty(0)
    for context in contexts:
        places = order[: max(_FEWEST_PLACES, tokens // (context + SCORED))]
        losses = _losses(network, stream, targets, places, context)
        found.append(_beside(found, context, losses, before))
        before = losses
    return found


def _beside(
    found: list[ContextLoss], context: int, losses: np.ndarray, before: np.ndarray
) -> ContextLoss:
    """What the losses [n, 2] of sums and counts say, beside those of half the context."""
    counts = losses[:, 1]
    if not found:
        mean = float(losses[:, 0].sum() / counts.sum())
        return ContextLoss(context, mean, 0.0, math.nan, int(counts.sum()))
    changes = (losses[:, 0] - before[: len(losses), 0]) / counts.sum()
    change = float(changes.sum())
    # Of the sum of n independent terms.
    error = math.sqrt(len(changes)) * float(changes.std(ddof=1))
    return ContextLoss(
        context, found[-1].loss + change, change, error, int(counts.sum())
    )


def _start_of(manifest: Manifest, tokens: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a set and the targets after each, [N] int64."""
    length = min(tokens, manifest.tokens - 1)
    (batch,) = evaluation_batches(manifest, BatchShape(length, 1), max_rows=1)
    return batch.inputs[0], batch.targets[0]


@torch.no_grad()
def _losses(
    network: TemporalEigenstateNetwork,
    stream: Tensor,
    targets: Tensor,
    places: list[int],
    context: int,
) -> np.ndarray:
    """[n, 2] float64: sum of the losses of the targets at each place, and their number."""
    device = network.embedding.weight.device
    rows = max(1, _PIECE // (context + SCORED))
    found = []
    for at in range(0, len(places), rows):
        some = places[at : at + rows]
        inputs = torch.stack([stream[p - context : p + SCORED] for p in some])
        scored = torch.stack([targets[p : p + SCORED] for p in some]).to(device)
        state = None
        # In pieces: the state is all that the next one needs of those before.
        for piece in inputs[:, :context].to(device).split(_PIECE // rows, dim=1):
            _, state = network(piece, state=state, return_state=True, last_only=True)
        last = inputs[:, context:].to(device)
        means = network(last, targets=scored, state=state)["row_losses"].double()
        counts = (scored != IGNORED_TARGET).sum(dim=1)
        found.append(torch.stack([means * counts, counts.double()], dim=1))
    return as_array(torch.cat(found))

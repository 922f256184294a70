"""What a task is: batches of (inputs, targets) and figures of a trained model.

Inputs and targets are [B, T] int64, targets IGNORED_TARGET where nothing is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ten_dist.config.model import IGNORED_TARGET

Batch = tuple[Tensor, Tensor]
EVALUATION_TOKENS = 8192
"""Tokens that a model is given at once when it is measured."""
HELD_OUT_SEED = 2**31
"""Of the rows of drawn tasks that models are measured on; no training has it."""


class Task(Protocol):
    """Something a model can be trained on and measured by."""

    vocab_size: int

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` training batches of `rows` rows; the same for the same seed."""
        ...

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures of a trained model, by name."""
        ...

    def quick_loss(self, model: nn.Module) -> float:
        """Held-out loss, in nats, of few rows, always the same: for curves."""
        ...


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Cross-entropy in nats, mean over all scored targets."""
    total, count = 0.0, 0
    for inputs, targets in batches:
        scored = int((targets != IGNORED_TARGET).sum())
        if scored:
            total += scored * model.compute_loss(inputs, targets)["ce_loss"].item()
            count += scored
    return total / count if count else math.nan


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Part of the scored targets that the model finds most likely."""
    rows = max(1, EVALUATION_TOKENS // inputs.shape[1])
    found = [model(piece).argmax(-1) for piece in inputs.split(rows)]
    scored = targets != IGNORED_TARGET
    return (torch.cat(found) == targets)[scored].double().mean().item()


def mask_before(targets: Tensor, position: int) -> Tensor:
    """`targets` [B, T] without those before `position`."""
    masked = targets.clone()
    masked[:, :position] = IGNORED_TARGET
    return masked

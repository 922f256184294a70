"""The training loss: cross-entropy and a weighted energy term (DESIGN 2.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ten_dist.config import IGNORED_TARGET
from ten_dist.model.precision import at_least_float32


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that count.

    Args:
        logits: [B, T, V], any float dtype; taken in float32.
        targets: [B, T] int64, IGNORED_TARGET where a position does not count.

    Returns:
        Scalar float32; 0 where no target counts.
    """
    flat_targets = targets.flatten()
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1),
        flat_targets,
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )
    return total / (flat_targets != IGNORED_TARGET).sum().clamp(min=1)


def combine_losses(
    ce_loss: Tensor, energy_loss: Tensor, energy_reg_weight: float
) -> dict[str, Tensor]:
    """`loss` (weighted: the one to train on), `ce_loss` and raw `energy_loss`."""
    return {
        "loss": ce_loss + energy_reg_weight * energy_loss,
        "ce_loss": ce_loss,
        "energy_loss": energy_loss,
    }

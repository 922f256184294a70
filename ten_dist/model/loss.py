"""The training loss: cross-entropy and a weighted energy term (DESIGN 2.3)."""

from __future__ import annotations

from torch import Tensor


def combine_losses(
    token_loss: Tensor, z_loss: Tensor, energy_loss: Tensor, energy_reg_weight: float
) -> dict[str, Tensor]:
    """The losses of a batch by name.

    Args:
        token_loss: cross-entropy and z-loss together, differentiable.
        z_loss: the part of it that is z-loss.
        energy_loss: raw energy.
        energy_reg_weight: its weight.

    Returns:
        `loss` (weighted: the one to train on), `ce_loss`, raw `energy_loss`, `z_loss`.
    """
    return {
        "loss": token_loss + energy_reg_weight * energy_loss,
        "ce_loss": token_loss - z_loss,
        "energy_loss": energy_loss,
        "z_loss": z_loss,
    }

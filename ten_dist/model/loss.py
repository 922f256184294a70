"""The training loss: cross-entropy and a weighted energy term (docs/model.md#loss)."""

from __future__ import annotations

from torch import Tensor


def combine_losses(
    token_loss: Tensor,
    energy_loss: Tensor,
    energy_reg_weight: float,
    z_loss: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of a batch by name.

    Args:
        token_loss: cross-entropy and z-loss together, differentiable.
        energy_loss: raw energy.
        energy_reg_weight: its weight.
        z_loss: the part of `token_loss` that is z-loss, or None where there is none.

    Returns:
        `loss` (weighted: the one to train on), `ce_loss`, raw `energy_loss`, and
        `z_loss` where there is one.
    """
    losses = {
        "loss": token_loss + energy_reg_weight * energy_loss,
        "ce_loss": token_loss,
        "energy_loss": energy_loss,
    }
    if z_loss is not None:
        losses |= {"ce_loss": token_loss - z_loss, "z_loss": z_loss}
    return losses

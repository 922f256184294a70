"""What a language model gives to training: its loss, and what an optimizer needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

from torch import Tensor, nn


class TrainableModel(nn.Module):
    """A model whose `forward` takes `input_ids` [B, T] and `targets` [B, T] and returns losses,
    and whose embedding, `embedding`, also is the weight of its output."""

    @overload
    def compute_loss(
        self, inputs: Tensor, targets: Tensor, return_dict: Literal[True] = True
    ) -> dict[str, Tensor]: ...

    @overload
    def compute_loss(
        self, inputs: Tensor, targets: Tensor, return_dict: Literal[False]
    ) -> Tensor: ...

    def compute_loss(
        self, inputs: Tensor, targets: Tensor, return_dict: bool = True
    ) -> dict[str, Tensor] | Tensor:
        """Training loss of a batch (docs/model.md#loss).

        Args:
            inputs, targets: [B, T] int64; targets of -100 are ignored.
            return_dict: return the parts as well.

        Returns:
            `loss`, what training minimizes, and `ce_loss`, mean in nats, float32 scalars; or
            `loss` alone. Of a Temporal Eigenstate Network `loss` is `ce_loss` +
            energy_reg_weight * `energy_loss` (+ `z_loss` where z_loss_weight is not 0), with
            `energy_loss` (raw) and `z_loss` (weighted) beside it, and `row_losses` [B], the
            mean cross-entropy of each row, without gradient.
        """
        losses = self(inputs, targets=targets)
        return losses if return_dict else losses["loss"]

    def num_parameters(self) -> int:
        """Number of parameters, the tied weight once, sharded ones in full."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters())

    def parameter_groups(
        self, weight_decay: float, matrices_apart: bool = False
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: parameters with `weight_decay`, then those without.

        With `matrices_apart` the hidden matrices are a group of their own, the first.
        """
        exempt, hidden = set(self.parameters_without_weight_decay()), set[str]()
        if matrices_apart:
            hidden = set(self.hidden_matrices())
        named = dict(self.named_parameters())
        decayed = named.keys() - exempt - hidden
        kinds = ((hidden, weight_decay), (decayed, weight_decay), (exempt, 0.0))
        return [
            {
                "params": [p for name, p in named.items() if name in names],
                "weight_decay": decay,
            }
            for names, decay in kinds
            if names
        ]

    def hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        """The matrices of the blocks, by name of the parameter: rows of each projection.

        A layer says which of its parameters are matrices in its attribute `matrix_rows`, by
        name: one number of rows, or several where the parameter holds several projections,
        one below the other. These and the embedding take weight decay, and these alone are
        for Muon.
        """
        return {
            f"{module_name}.{name}": rows
            for module_name, module in self.named_modules()
            for name, rows in getattr(module, "matrix_rows", {}).items()
        }

    def parameters_without_weight_decay(self) -> Iterator[str]:
        """Names of the parameters that take no weight decay.

        Those of the recurrence, norms, short convolutions and biases.
        """
        decayed = {"embedding.weight", *self.hidden_matrices()}
        return (name for name, _ in self.named_parameters() if name not in decayed)

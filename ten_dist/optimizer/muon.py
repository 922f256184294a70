"""Muon for the matrices of a model, AdamW for everything else, as one optimizer.

Muon (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) keeps
one moment M of the gradient G of a matrix and makes the step orthogonal:

    M <- beta M + (1 - beta) G
    W <- W - lr (weight_decay W + max(1, rows / columns)^(1/2) orthogonalize(beta M + (1 - beta) G))

the second sum being Nesterov's. Scale and Nesterov's form are those of his implementation
(github.com/KellerJordan/Muon). A weight that holds several projections is orthogonalized
projection by projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ten_dist.checkpoint import MOMENTUM
from ten_dist.optimizer.shared_matrices import SharedMatrices, split_weights

BY_MUON = "by_muon"
"""Key of a parameter group: whether its parameters are matrices for Muon."""
RATE_FACTOR = "rate_factor"
"""Key of a parameter group: by what the learning rate of the schedule is multiplied for it."""


class Muon(torch.optim.Optimizer):
    """Steps a group of matrices, and has AdamW step the other groups.

    It steps what ZeRO puts into its groups: parameters at stage 0, else flat vectors with
    this rank's ranges of them. Which these are it must be told by :meth:`distribute` before
    the first step, which all ranks must make together.

    Args:
        matrices: group of the matrices, with `lr`, `weight_decay` and `momentum`, beta.
        adamw: of the other groups.
    """

    def __init__(self, matrices: dict[str, Any], adamw: torch.optim.Optimizer) -> None:
        super().__init__([{**matrices, BY_MUON: True}, *adamw.param_groups], {})
        self.adamw = adamw
        adamw.state = self.state
        self._share: Callable[[Sequence[str]], SharedMatrices] | None = None
        self._placed: dict[Tensor, dict[str, tuple[int, int]]] = {}
        self._shared: dict[tuple[str, ...], SharedMatrices] = {}

    def distribute(
        self,
        placed: Mapping[Tensor, dict[str, tuple[int, int]]],
        share: Callable[[Sequence[str]], SharedMatrices],
    ) -> None:
        """Say where the elements of the matrices are.

        Args:
            placed: for each tensor that is stepped and has elements of matrices on any
                rank, by the names of their weights: where those of this rank begin in it,
                and how many there are, perhaps none.
            share: from names of weights to their matrices.
        """
        self._placed, self._share = dict(placed), share

    def keep_whole(
        self, weights: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]]
    ) -> None:
        """Instead of :meth:`distribute`, where a process has the matrices to itself.

        Args:
            weights: all of the group, [rows, columns] float32, by name.
            rows: of each projection of a weight, by its name.
        """
        sizes = {name: (0, weight.numel()) for name, weight in weights.items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        devices = {weight.device for weight in weights.values()}
        matrices = split_weights(shapes, rows)
        shared = SharedMatrices(matrices, [sizes], 0, devices.pop(), torch.float32)
        placed = {weight: {name: sizes[name]} for name, weight in weights.items()}
        self.distribute(placed, lambda _: shared)

    def holds_matrices(self, tensor: Tensor) -> bool:
        """Whether a tensor that is stepped has elements of matrices, on any rank."""
        return tensor in self._placed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update what is in the groups from its `.grad`, float32, which is overwritten."""
        # ZeRO calls with some of the groups, or with some that are empty.
        groups = [group for group in self.param_groups if group["params"]]
        self.adamw.param_groups = [g for g in groups if not g.get(BY_MUON)]
        if self.adamw.param_groups:
            self.adamw.step()
        for group in groups:
            if group.get(BY_MUON):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        beta, rate = group["momentum"], group["lr"]
        updates: dict[str, Tensor] = {}
        for tensor in group["params"]:
            state, gradient = self.state[tensor], tensor.grad
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(tensor, requires_grad=False)
            state[MOMENTUM].lerp_(gradient, 1 - beta)
            gradient.lerp_(state[MOMENTUM], beta)
            for name, (start, size) in self._placed[tensor].items():
                updates[name] = gradient.view(-1).narrow(0, start, size)
        names = tuple(updates)
        if names not in self._shared:
            assert self._share is not None, "distribute() comes before the first step"
            self._shared[names] = self._share(names)
        self._shared[names].orthogonalize(updates)
        for tensor in group["params"]:
            tensor.mul_(1 - rate * group["weight_decay"])
            tensor.add_(tensor.grad, alpha=-rate)

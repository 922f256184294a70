"""Tasks of state tracking: the product of all elements of a group so far, at each position.

Word problems of groups (Merrill, Petty and Sabharwal, "The Illusion of State in
State-Space Models", arXiv 2404.08819). A diagonal state whose eigenvalues are real and
positive cannot hold parity at every length in finite precision, however many layers there are
(Grazzi et al., arXiv 2411.12537); permutations of five are out of reach of a fixed number of
layers with diagonal transitions, and of attention (Merrill et al., section 4), as far as is
known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.tasks.interface import (
    HELD_OUT_SEED,
    Batch,
    accuracy,
    mask_before,
    mean_loss,
)


class _Words:
    """Rows of uniform random elements; trained at one length, measured at longer ones.

    Args:
        table: [n, n] int64, the element that is element i followed by element j; 0 is the
            neutral one.
    """

    LENGTH = 32
    LENGTHS = (32, 64, 128, 16 * LENGTH)

    def __init__(self, table: Tensor) -> None:
        self.vocab_size = len(table)
        self.table = table

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        """A batch of [rows, length]; targets are products, the position's own included."""
        inputs = torch.randint(self.vocab_size, (rows, length), generator=generator)
        product = torch.zeros(rows, dtype=torch.int64)
        targets = torch.empty_like(inputs)
        for position in range(length):
            product = self.table[product, inputs[:, position]]
            targets[:, position] = product
        return inputs, targets

    def batches(self, rows: int, steps: int, seed: int) -> Iterator[Batch]:
        """Rows of the training length."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.draw(rows, self.LENGTH, generator)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`accuracy at N`: of the last 32 positions of 256 rows of N."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        found = {}
        for length in self.LENGTHS:
            inputs, targets = self.draw(256, length, generator)
            late = mask_before(targets, length - self.LENGTH)
            found[f"accuracy at {length}"] = accuracy(model, inputs, late)
        return found

    def quick_loss(self, model: nn.Module) -> float:
        """Loss of 64 rows of the training length."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return mean_loss(model, [self.draw(64, self.LENGTH, generator)])


class Parity(_Words):
    """Whether the number of ones so far is odd. Chance is 1/2."""

    def __init__(self) -> None:
        super().__init__(torch.tensor([[0, 1], [1, 0]]))


class PermutationWords(_Words):
    """The product of all permutations of `degree` things so far, one token for each of the
    degree! permutations. Chance is 1 in their number.

    Permutations of three (S3) are solvable, but not commutative; of five (S5) they are
    complete for NC1.
    """

    def __init__(self, degree: int) -> None:
        elements = list(itertools.permutations(range(degree)))
        index = {element: i for i, element in enumerate(elements)}
        # First p, then q.
        table = [[index[tuple(q[i] for i in p)] for q in elements] for p in elements]
        super().__init__(torch.tensor(table))

"""Orthogonalizing matrices whose elements lie on several ranks.

Each matrix has an owner, who gets its elements from the ranks that hold them,
orthogonalizes it once and sends them back. Owners are chosen so that all ranks have about
the same to compute. That goes in rounds, each an exchange there and one back, in which a
rank owns about :data:`ROUND_ELEMENTS` elements: memory is bounded, and collectives are few.

What is orthogonalized, and by which products, depends neither on the number of ranks nor on
who holds what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ten_dist.optimizer.newton_schulz import newton_schulz_flops, orthogonalize

ROUND_ELEMENTS = 16_000_000
"""Of the matrices that a rank owns in a round, unless one alone is larger."""


@dataclasses.dataclass(frozen=True)
class LogicalMatrix:
    """One projection: some rows of a weight, which may hold several."""

    weight: str
    """Name of the parameter."""
    start: int
    """Its first element in the weight, in row-major order."""
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return self.rows * self.columns

    @property
    def flops(self) -> int:
        """Operations that orthogonalize it."""
        return newton_schulz_flops(self.rows, self.columns)

    @property
    def scale(self) -> float:
        """Of its update, max(1, rows / columns)^(1/2) as in Keller Jordan's Muon: outputs
        then change alike, whatever the shape is."""
        return max(1.0, self.rows / self.columns) ** 0.5


def split_weights(
    shapes: Mapping[str, Sequence[int]], rows: Mapping[str, Sequence[int]]
) -> list[LogicalMatrix]:
    """The projections that weights consist of.

    Args:
        shapes: [rows, columns] of weights, by name.
        rows: of each projection of a weight, by its name.

    Raises:
        ValueError: the projections do not add up to the weight.
    """
    found = []
    for name, (height, columns) in shapes.items():
        if sum(rows[name]) != height:
            raise ValueError(f"{name} has {height} rows, not {sum(rows[name])}")
        start = 0
        for part in rows[name]:
            found.append(LogicalMatrix(name, start, part, columns))
            start += part * columns
    return found


def rounds_of(
    matrices: Sequence[LogicalMatrix], ranks: int
) -> list[list[tuple[int, LogicalMatrix]]]:
    """Who orthogonalizes what in each round: pairs of owner and matrix.

    The costliest matrix first, each goes to the rank that has least to do.
    """
    queues: list[list[LogicalMatrix]] = [[] for _ in range(ranks)]
    costs = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.flops):
        owner = costs.index(min(costs))
        queues[owner].append(matrix)
        costs[owner] += matrix.flops
    rounds = []
    while any(queues):
        taken = []
        for owner, queue in enumerate(queues):
            left = ROUND_ELEMENTS
            while queue and (left == ROUND_ELEMENTS or queue[0].elements <= left):
                matrix = queue.pop(0)
                left -= matrix.elements
                taken.append((owner, matrix))
        rounds.append(taken)
    return rounds


Held = Mapping[str, tuple[int, int]]
"""Elements [start, stop) of each weight that a rank holds, by name."""


class SharedMatrices:
    """Some matrices, and where their elements lie.

    Args:
        matrices: in the same order on every rank.
        held: what each rank holds of their weights.
        rank: this one.
        device: to compute and to communicate on.
        dtype: of the products.
    """

    def __init__(
        self,
        matrices: Sequence[LogicalMatrix],
        held: Sequence[Held],
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._held, self._rank = held, rank
        self._device, self._dtype = device, dtype
        self._rounds = rounds_of(matrices, len(held))
        # At ZeRO stage 0 every rank has the same gradients of all weights.
        self._whole = all(
            self._range(rank, m) == (m.start, m.start + m.elements)
            for rank in range(len(held))
            for m in matrices
        )

    def _range(self, rank: int, matrix: LogicalMatrix) -> tuple[int, int]:
        """Elements of a matrix, [start, stop) in its weight, that a rank holds."""
        start, stop = self._held[rank].get(matrix.weight, (0, 0))
        low = max(start, matrix.start)
        return low, max(low, min(stop, matrix.start + matrix.elements))

    def orthogonalize(self, values: Mapping[str, Tensor]) -> None:
        """Replace matrices by orthogonal ones, scaled; every rank must call this.

        Args:
            values: flat float32, of each weight what this rank holds of it; in place.
        """
        for taken in self._rounds:
            self._do_round(taken, values)

    def _do_round(
        self, taken: list[tuple[int, LogicalMatrix]], values: Mapping[str, Tensor]
    ) -> None:
        ranks = range(len(self._held))
        own = {
            matrix: torch.empty(matrix.elements, device=self._device)
            for owner, matrix in taken
            if owner == self._rank
        }
        # By rank: its pieces of the matrices here, and the pieces here of its matrices.
        pieces = [
            [p for m in own if (p := self._of_own(r, m, own[m])).numel()] for r in ranks
        ]
        held: list[list[Tensor]] = [[] for _ in ranks]
        for owner, matrix in taken:
            low, high = self._range(self._rank, matrix)
            if low < high:
                offset = self._held[self._rank][matrix.weight][0]
                held[owner].append(values[matrix.weight][low - offset : high - offset])
        if self._whole:
            for piece, whole in zip(held[self._rank], own.values(), strict=True):
                whole.copy_(piece)
        else:
            self._exchange(held, pieces)
        for matrix, flat in own.items():
            square = flat.view(matrix.rows, matrix.columns)
            square.copy_(orthogonalize(square, self._dtype)).mul_(matrix.scale)
        self._exchange(pieces, held)

    def _of_own(self, rank: int, matrix: LogicalMatrix, flat: Tensor) -> Tensor:
        low, high = self._range(rank, matrix)
        return flat[low - matrix.start : high - matrix.start]

    def _exchange(self, sent: list[list[Tensor]], taken: list[list[Tensor]]) -> None:
        """Give each rank the tensors `sent` to it, and copy into `taken` what it gives."""
        if len(sent) == 1:
            for piece, place in zip(sent[0], taken[0], strict=True):
                place.copy_(piece)
            return
        message = torch.cat([p.to(self._device) for p in [*_all(sent), torch.empty(0)]])
        given, asked = ([sum(p.numel() for p in x) for x in by] for by in (sent, taken))
        answer = message.new_empty(sum(asked))
        dist.all_to_all_single(answer, message, asked, given)
        places = list(_all(taken))
        for place, part in zip(places, answer.split([p.numel() for p in places])):
            place.copy_(part)


def _all(by_rank: list[list[Tensor]]) -> Iterator[Tensor]:
    return (piece for pieces in by_rank for piece in pieces)

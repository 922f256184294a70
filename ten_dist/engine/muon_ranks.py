"""Telling Muon where ZeRO keeps the elements of its matrices."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import torch
from torch import Tensor

from ten_dist.engine.checkpointing.held_state import held_state
from ten_dist.engine.distributed import Ranks
from ten_dist.optimizer.muon import Muon
from ten_dist.optimizer.shared_matrices import SharedMatrices, split_weights

_DTYPES = {"bf16": torch.bfloat16, "bf16_params": torch.bfloat16, "fp16": torch.float16}


def distribute(
    optimizer: Muon, engine: deepspeed.DeepSpeedEngine, ranks: Ranks, precision: str
) -> None:
    """Have an optimizer share its matrices over the ranks; all ranks must call this.

    Products are in float32 on CPUs, and on GPUs in the precision of the model's: 16 bits
    are enough for Newton-Schulz (Keller Jordan, 2024).

    Args:
        optimizer: that of `engine`.
        engine: around the network.
        ranks: of the run.
        precision: `--precision`.
    """
    held = held_state(engine, ranks)
    rows = engine.module.hidden_matrices()
    stepped = held.stepped()
    numbers = {id(tensor): number for number, tensor in enumerate(stepped)}
    own, starts = {}, {}
    for piece in held.held_slices():
        if piece.name in rows:
            tensor, starts[piece.name] = held.place(piece)
            own[piece.name] = (piece.start, piece.stop, numbers[id(tensor)])
    by_rank = ranks.gather(own)
    ranges = [{n: where[:2] for n, where in found.items()} for found in by_rank]
    placed: dict[Tensor, dict[str, tuple[int, int]]] = {}
    for name in rows:
        # Of a weight that has nothing here, others know which tensor it belongs to.
        number = next(found[name][2] for found in by_rank if name in found)
        start, stop = ranges[ranks.rank].get(name, (0, 0))
        begin = starts.get(name, 0)
        placed.setdefault(stepped[number], {})[name] = (begin, stop - start)
    matrices = split_weights({name: held.shapes[name] for name in rows}, rows)
    dtype = torch.float32
    if ranks.device.type == "cuda":
        dtype = _DTYPES.get(precision, dtype)

    def share(names: Sequence[str]) -> SharedMatrices:
        chosen = [matrix for matrix in matrices if matrix.weight in names]
        return SharedMatrices(chosen, ranges, ranks.rank, ranks.device, dtype)

    optimizer.distribute(placed, share)

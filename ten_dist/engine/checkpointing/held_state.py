"""What a rank holds of the weights and moments of a run, at every ZeRO stage.

ZeRO cuts parameters up in its own ways: at stages 1 and 2 the parameters of a group form
one flat vector, of which each rank holds an equal range in float32; at stage 3 each rank
holds an equal range of each parameter. Here all of them are ranges of elements of named
tensors, which is all that a checkpoint knows of
(:class:`ten_dist.checkpoint.TensorSlice`).

How ZeRO holds them is read by :mod:`ten_dist.engine.deepspeed_internals`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from ten_dist.checkpoint import (
    ADAMW_MOMENTS,
    MOMENTS,
    MUON_MOMENTS,
    WEIGHT,
    TensorSlice,
)
from ten_dist.engine import deepspeed_internals as internals
from ten_dist.engine.distributed import Ranks
from ten_dist.optimizer.muon import Muon

Source = Callable[[str, str, int, int], Tensor]
"""(kind, name, start, stop) to the values of that slice, float32 in host memory."""

KINDS = (WEIGHT, *MOMENTS)
"""Of which each slice has its own: see :meth:`HeldState.values`."""


class HeldState:
    """Float32 weights and moments of this rank; this class is that of stage 0.

    There every rank holds everything, and writes an equal range of each tensor.

    Attributes:
        slices: of parameters, what this rank writes; over all ranks each element once.
        buffer_slices: the same of buffers, which rank 0 writes.
        buffers: of the module, by name, the same on every rank.
        shapes: of parameters and buffers, by name. A tied parameter is there once, under
            its first name.
        on_disk: whether weights and moments lie on NVMe, because host memory is short.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> None:
        module = engine.module
        self._ranks = ranks
        self.on_disk = False
        self._zero = engine.optimizer
        # ZeRO's is around the one that steps; at stage 0 there is that one alone.
        self._optimizer: torch.optim.Optimizer = getattr(
            self._zero, "optimizer", self._zero
        )
        # Of any type: DeepSpeed gives them attributes that torch's have not.
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())
        self.shapes = {
            name: torch.Size(getattr(tensor, "ds_shape", tensor.shape))
            for name, tensor in (self._parameters | self.buffers).items()
        }
        self.slices = [
            TensorSlice(name, *held)
            for name, parameter in self._parameters.items()
            if (held := self._range(parameter)) and held[0] < held[1]
        ]
        self._groups = [self.slices]
        self.buffer_slices = [
            TensorSlice(name, 0, buffer.numel())
            for name, buffer in self.buffers.items()
            if ranks.is_first
        ]

    def _range(self, parameter: Any) -> tuple[int, int] | None:
        """Elements [start, stop) of a parameter that this rank writes, or None."""
        size, rank, world_size = (
            parameter.numel(),
            self._ranks.rank,
            self._ranks.world_size,
        )
        return size * rank // world_size, size * (rank + 1) // world_size

    def held_slices(self) -> list[TensorSlice]:
        """What this rank updates of parameters, which others may, too."""
        return [TensorSlice(n, 0, p.numel()) for n, p in self._parameters.items()]

    def stepped(self) -> list[Tensor]:
        """The tensors that the optimizer steps: the keys of its state."""
        return list(self._parameters.values())

    def place(self, piece: TensorSlice) -> tuple[Tensor, int]:
        """The stepped tensor that holds a slice, and where in it that begins."""
        return self._parameters[piece.name], piece.start

    def _moments(self, key: Tensor) -> tuple[str, ...]:
        """Moments that the optimizer has of a tensor that it steps."""
        optimizer = self._optimizer
        by_muon = isinstance(optimizer, Muon) and optimizer.holds_matrices(key)
        return MUON_MOMENTS if by_muon else ADAMW_MOMENTS

    def _kinds(self, piece: TensorSlice, kinds: Sequence[str]) -> list[str]:
        """Of some kinds, those that there are of a slice."""
        existing = (WEIGHT, *self._moments(self.place(piece)[0]))
        return [kind for kind in kinds if kind in existing]

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        # Not by DeepSpeed's safe_get_*, which copy to the GPU what was moved off it.
        key, start = self.place(piece)
        values = key if kind == WEIGHT else self._optimizer.state[key][kind]
        return values.detach().view(-1).narrow(0, start, piece.stop - piece.start)

    def _in_memory(
        self, group: int, *, changed: bool
    ) -> contextlib.AbstractContextManager:
        """Have a group of slices in memory, and write it back if it is changed."""
        return contextlib.nullcontext()

    def values(
        self, kinds: Sequence[str], tick: Callable[[], None] = lambda: None
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Key and values, flat, of all slices and of those of `kinds` that each one has;
        buffers are weights.

        Values may be a view of what training changes, and may change when the next are
        asked for. Moments are there after the first update, or after :meth:`prepare`.
        `tick` is called before each.
        """
        for group, pieces in enumerate(self._groups):
            with self._in_memory(group, changed=False):
                for piece in pieces:
                    for kind in self._kinds(piece, kinds):
                        tick()
                        yield piece.key(kind), self._read(kind, piece)
        for piece in self.buffer_slices if WEIGHT in kinds else ():
            yield piece.key(WEIGHT), self.buffers[piece.name].view(-1)

    def value_shapes(self, kinds: Sequence[str]) -> dict[str, tuple[int]]:
        """Shapes by key, in the order of :meth:`values`."""
        pieces = [
            (piece, kind) for piece in self.slices for kind in self._kinds(piece, kinds)
        ]
        if WEIGHT in kinds:
            pieces += [(piece, WEIGHT) for piece in self.buffer_slices]
        return {piece.key(kind): (piece.stop - piece.start,) for piece, kind in pieces}

    def load(self, source: Source, optimizer_steps: int) -> None:
        """Set weights, in float32 and in the precision of training, and moments.

        Does not communicate; every rank must call :meth:`settle` next.

        Args:
            source: where the values are.
            optimizer_steps: updates that the moments have seen.
        """
        self._make_moments(optimizer_steps)
        self._copy(source)

    def _copy(self, source: Source) -> None:
        self._copy_slices(source, self.held_slices())

    def _copy_slices(self, source: Source, pieces: Sequence[TensorSlice]) -> None:
        for piece in pieces:
            for kind in self._kinds(piece, KINDS):
                values = source(kind, piece.name, piece.start, piece.stop)
                self._read(kind, piece).copy_(values)

    def settle(self) -> None:
        """Bring what ranks keep of each other's parameters up to date."""

    def optimizer_steps(self) -> int:
        """Updates that the moments have seen, which AdamW corrects its bias by."""
        states = [self._optimizer.state.get(key, {}) for key in self.stepped()]
        # Muon does not count.
        return int(next((state["step"] for state in states if "step" in state), 0))

    def prepare(self) -> None:
        """Make the moments of parameters that have seen no update yet: zeros."""
        if not any(self._optimizer.state.get(key) for key in self.stepped()):
            self._make_moments(0)

    def _make_moments(self, steps: int) -> None:
        # Muon has it for what is no matrix.
        adamw = getattr(self._optimizer, "adamw", self._optimizer)
        fused = adamw.defaults.get("fused")
        for group, key in enumerate(self.stepped()):
            with self._in_memory(group, changed=True):
                state = self._optimizer.state[key]
                moments = self._moments(key)
                for moment in moments:
                    if moment not in state:
                        state[moment] = torch.zeros_like(key, requires_grad=False)
                if moments == MUON_MOMENTS:
                    continue
                if isinstance(adamw, DeepSpeedCPUAdam):
                    state["step"] = steps
                else:
                    # torch's fused AdamW counts where the parameters are.
                    device = key.device if fused else "cpu"
                    state["step"] = torch.tensor(float(steps), device=device)


class _Partitioned(HeldState):
    """Stages 1 and 2: a range of each group's flat vector."""

    def held_slices(self) -> list[TensorSlice]:
        return self.slices

    def _range(self, parameter: Any) -> tuple[int, int] | None:
        return internals.range_of_fragment(parameter)

    def stepped(self) -> list[Tensor]:
        return internals.flat_partitions(self._zero)

    def place(self, piece: TensorSlice) -> tuple[Tensor, int]:
        parameter = self._parameters[piece.name]
        group, offset = internals.place_of_fragment(parameter)
        return self.stepped()[group], offset

    def _copy(self, source: Source) -> None:
        for name, parameter in self._parameters.items():
            values = source(WEIGHT, name, 0, parameter.numel())
            parameter.detach().copy_(values.view_as(parameter))
        self._copy_slices(source, self.slices)


class _Sharded(HeldState):
    """Stage 3: an equal range of each parameter, the last ones padded.

    A group is what DeepSpeed updates at one time: a range of the parameters, their
    partitions in one flat vector. Where the state is on NVMe, one group at a time is in
    memory, and small ones always.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> None:
        super().__init__(engine, ranks)
        self.on_disk = internals.swaps_optimizer(self._zero)
        self._groups = [[] for _ in self.stepped()]
        for piece in self.slices:
            self._groups[self._group_and_offset(piece)[0]].append(piece)
        self.slices = [piece for pieces in self._groups for piece in pieces]

    def held_slices(self) -> list[TensorSlice]:
        return self.slices

    def _range(self, parameter: Any) -> tuple[int, int] | None:
        return internals.range_of_shard(parameter)

    def stepped(self) -> list[Tensor]:
        return internals.flat_shards(self._zero)

    def _group_and_offset(self, piece: TensorSlice) -> tuple[int, int]:
        parameter = self._parameters[piece.name]
        return internals.place_of_shard(self._zero, parameter)

    def place(self, piece: TensorSlice) -> tuple[Tensor, int]:
        group, offset = self._group_and_offset(piece)
        return self.stepped()[group], offset

    def _in_memory(
        self, group: int, *, changed: bool
    ) -> contextlib.AbstractContextManager[None]:
        return internals.swapped_in(self._zero, group, changed)

    def _copy(self, source: Source) -> None:
        internals.free_whole_parameters(self._zero)
        for group, pieces in enumerate(self._groups):
            with self._in_memory(group, changed=True):
                self._copy_slices(source, pieces)
                internals.take_up_shards(self._zero, group)

    def settle(self) -> None:
        internals.gather_whole_parameters(self._zero)


def held_state(engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> HeldState:
    """What this rank holds, at the ZeRO stage of `engine`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return HeldState(engine, ranks)
    if stage < 3:
        return _Partitioned(engine, ranks)
    return _Sharded(engine, ranks)

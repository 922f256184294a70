"""What a rank holds of the weights and moments of a run, at every ZeRO stage.

ZeRO cuts parameters up in its own ways: at stages 1 and 2 the parameters of a group form
one flat vector, of which each rank holds an equal range in float32; at stage 3 each rank
holds an equal range of each parameter. Here all of them are ranges of elements of named
tensors, which is all that a checkpoint knows of
(:class:`ten_dist.checkpoint.TensorSlice`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from ten_dist.checkpoint import MOMENTS, WEIGHT, TensorSlice
from ten_dist.engine import deepspeed_internals as internals
from ten_dist.engine.distributed import Ranks

Source = Callable[[str, str, int, int], Tensor]
"""(kind, name, start, stop) to the values of that slice, float32 in host memory."""


class HeldState(abc.ABC):
    """Float32 weights and moments of this rank.

    Attributes:
        slices: of parameters, what this rank writes; over all ranks each element once.
        buffers: of the module, by name, the same on every rank.
        shapes: of parameters and buffers, by name. A tied parameter is there once, under
            its first name.
        on_disk: whether weights and moments lie on NVMe, because host memory is short.
    """

    slices: list[TensorSlice]
    on_disk = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        module = engine.module
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())
        self.shapes = {
            name: internals.whole_shape(tensor)
            for name, tensor in (self.parameters | self.buffers).items()
        }

    def values(self, kinds: Sequence[str]) -> Iterator[tuple[TensorSlice, str, Tensor]]:
        """Slice, kind and values, flat, of all `slices` and of each one's kinds.

        Values may be a view of what training changes, and may change when the next are
        asked for. Moments are there after the first update, or after :meth:`prepare`.
        """
        for piece in self.slices:
            for kind in kinds:
                yield piece, kind, self._read(kind, piece)

    @abc.abstractmethod
    def _read(self, kind: str, piece: TensorSlice) -> Tensor: ...

    def load(self, source: Source, optimizer_steps: int) -> None:
        """Set weights, in float32 and in the precision of training, and moments.

        Does not communicate; every rank must call :meth:`settle` next.

        Args:
            source: where the values are.
            optimizer_steps: updates that the moments have seen.
        """
        self._make_moments(optimizer_steps)
        self._copy(source)

    @abc.abstractmethod
    def _copy(self, source: Source) -> None: ...

    def settle(self) -> None:
        """Bring what ranks keep of each other's parameters up to date."""

    @abc.abstractmethod
    def _stepped(self) -> list[Tensor]:
        """The tensors that the optimizer steps: the keys of its state."""

    @abc.abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer: ...

    def optimizer_steps(self) -> int:
        """Updates that the moments have seen, which AdamW corrects its bias by."""
        states = [self._optimizer().state.get(key) for key in self._stepped()]
        return int(states[0]["step"]) if states and states[0] else 0

    def prepare(self) -> None:
        """Make the moments of parameters that have seen no update yet: zeros."""
        if not any(self._optimizer().state.get(key) for key in self._stepped()):
            self._make_moments(0)

    def _make_moments(self, steps: int) -> None:
        for key in self._stepped():
            self._make_moments_of(key, steps)

    def _make_moments_of(self, key: Tensor, steps: int) -> None:
        optimizer = self._optimizer()
        state = optimizer.state[key]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(key, requires_grad=False)
        if isinstance(optimizer, DeepSpeedCPUAdam):
            state["step"] = steps
        else:
            # torch's fused AdamW counts where the parameters are.
            fused = optimizer.defaults.get("fused")
            device = key.device if fused else "cpu"
            state["step"] = torch.tensor(float(steps), device=device)


class _Replicated(HeldState):
    """Stage 0: every rank holds everything, and writes an equal range of each tensor."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> None:
        super().__init__(engine)
        self._engine = engine
        self.slices = []
        for name, parameter in self.parameters.items():
            start = parameter.numel() * ranks.rank // ranks.world_size
            stop = parameter.numel() * (ranks.rank + 1) // ranks.world_size
            if start < stop:
                self.slices.append(TensorSlice(name, start, stop))

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer

    def _stepped(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _whole(self, kind: str, name: str) -> Tensor:
        parameter = self.parameters[name]
        if kind == WEIGHT:
            return parameter.detach().view(-1)
        return self._optimizer().state[parameter][kind].view(-1)

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        return self._whole(kind, piece.name)[piece.start : piece.stop]

    def _copy(self, source: Source) -> None:
        for name, parameter in self.parameters.items():
            for kind in (WEIGHT, *MOMENTS):
                values = source(kind, name, 0, parameter.numel())
                self._whole(kind, name).copy_(values)


class _Partitioned(HeldState):
    """Stages 1 and 2: a range of each group's flat vector."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine)
        self._zero = engine.optimizer
        self._groups = internals.partitioned_groups(self._zero)
        self.slices = []
        for name, parameter in self.parameters.items():
            held = internals.range_in_parameter(parameter)
            if held is not None:
                self.slices.append(TensorSlice(name, *held))

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _stepped(self) -> list[Tensor]:
        return self._groups

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        group, start, size = internals.range_in_group(self.parameters[piece.name])
        flat = self._groups[group]
        if kind != WEIGHT:
            flat = self._optimizer().state[flat][kind]
        return flat.detach().narrow(0, start, size)

    def _copy(self, source: Source) -> None:
        for name, parameter in self.parameters.items():
            values = source(WEIGHT, name, 0, parameter.numel())
            parameter.detach().copy_(values.view_as(parameter))
        for piece in self.slices:
            for kind in (WEIGHT, *MOMENTS):
                values = source(kind, piece.name, piece.start, piece.stop)
                self._read(kind, piece).copy_(values)


class _Sharded(HeldState):
    """Stage 3: an equal range of each parameter, the last ones padded."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine)
        self._zero = engine.optimizer
        self.slices = []
        for name, parameter in self.parameters.items():
            start, stop = internals.shard_range(parameter)
            if start < stop:
                self.slices.append(TensorSlice(name, start, stop))
        # Group, and where it begins in the flat vector of that.
        self._places = {
            name: internals.shard_place(self._zero, parameter)
            for name, parameter in self.parameters.items()
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _stepped(self) -> list[Tensor]:
        return internals.sharded_groups(self._zero)

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        # Not by DeepSpeed's safe_get_*, which copy to the GPU what was moved off it.
        group, offset = self._places[piece.name]
        flat = self._stepped()[group]
        if kind != WEIGHT:
            flat = self._optimizer().state[flat][kind]
        return flat.detach().narrow(0, offset, piece.stop - piece.start)

    def _copy(self, source: Source) -> None:
        internals.partition_persistent(self._zero)
        for piece in self.slices:
            self._copy_slice(source, piece)
            weights = self._read(WEIGHT, piece)
            held = internals.shard_values(self.parameters[piece.name])
            held[: weights.numel()].copy_(weights)

    def _copy_slice(self, source: Source, piece: TensorSlice) -> None:
        for kind in (WEIGHT, *MOMENTS):
            values = source(kind, piece.name, piece.start, piece.stop)
            self._read(kind, piece).copy_(values)

    def settle(self) -> None:
        internals.gather_persistent(self._zero)


class _Swapped(_Sharded):
    """Stage 3 with its state on NVMe, of which one sub-group at a time is in memory.

    A sub-group is what DeepSpeed updates at one time: a range of the parameters, their
    partitions in one flat vector. Small ones are not swapped.
    """

    on_disk = True

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine)
        self._slices_of: list[list[TensorSlice]] = [[] for _ in self._stepped()]
        for piece in self.slices:
            self._slices_of[self._places[piece.name][0]].append(piece)
        self.slices = [piece for pieces in self._slices_of for piece in pieces]

    def values(self, kinds: Sequence[str]) -> Iterator[tuple[TensorSlice, str, Tensor]]:
        for group, pieces in enumerate(self._slices_of):
            with internals.subgroup_in_memory(self._zero, group, changed=False):
                for piece in pieces:
                    for kind in kinds:
                        yield piece, kind, self._read(kind, piece)

    def _make_moments(self, steps: int) -> None:
        for group, key in enumerate(self._stepped()):
            with internals.subgroup_in_memory(self._zero, group, changed=True):
                self._make_moments_of(key, steps)

    def _copy(self, source: Source) -> None:
        internals.partition_persistent(self._zero)
        for group, pieces in enumerate(self._slices_of):
            with internals.subgroup_in_memory(self._zero, group, changed=True):
                for piece in pieces:
                    self._copy_slice(source, piece)
                internals.refresh_computed_weights(self._zero, group)


def held_state(engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> HeldState:
    """What this rank holds, at the ZeRO stage of `engine`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Replicated(engine, ranks)
    if stage < 3:
        return _Partitioned(engine)
    swapped = internals.swaps_state(engine.optimizer)
    return _Swapped(engine) if swapped else _Sharded(engine)

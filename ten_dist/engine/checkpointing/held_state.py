"""What a rank holds of the weights and moments of a run, at every ZeRO stage.

ZeRO cuts parameters up in its own ways: at stages 1 and 2 the parameters of a group form
one flat vector, of which each rank holds an equal range in float32; at stage 3 each rank
holds an equal range of each parameter. Here all of them are ranges of elements of named
tensors, which is all that a checkpoint knows of
(:class:`ten_dist.checkpoint.TensorSlice`).
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from ten_dist.checkpoint import MOMENTS, WEIGHT, TensorSlice
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
            name: torch.Size(getattr(tensor, "ds_shape", tensor.shape))
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
        # The first is ZeRO's, the second that of its optimizer for bfloat16 parameters.
        groups = getattr(self._zero, "single_partition_of_fp32_groups", None)
        self._groups: list[Tensor] = groups or self._zero.fp32_groups_flat_partition
        self.slices = []
        for name, parameter in self.parameters.items():
            # What DeepSpeed calls low precision here are the parameters of the module.
            if parameter._hp_mapping is not None:
                address = parameter._hp_mapping.lp_fragment_address
                piece = TensorSlice(name, address.start, address.start + address.numel)
                self.slices.append(piece)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _stepped(self) -> list[Tensor]:
        return self._groups

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        mapping = self.parameters[piece.name]._hp_mapping
        flat = self._groups[mapping.param_group_index]
        if kind != WEIGHT:
            flat = self._optimizer().state[flat][kind]
        address = mapping.hp_fragment_address
        return flat.detach().narrow(0, address.start, address.numel)

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
            rank = torch.distributed.get_rank(parameter.ds_process_group)
            start = rank * parameter.partition_numel()
            stop = min(start + parameter.partition_numel(), parameter.ds_numel)
            if start < stop:
                self.slices.append(TensorSlice(name, start, stop))
        # Group, and where it begins in the flat vector of that.
        self._places = {
            name: self._zero.grad_position[self._zero.get_param_id(parameter)]
            for name, parameter in self.parameters.items()
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _stepped(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _read(self, kind: str, piece: TensorSlice) -> Tensor:
        # Not by DeepSpeed's safe_get_*, which copy to the GPU what was moved off it.
        group, offset, _ = self._places[piece.name]
        flat = self._stepped()[group]
        if kind != WEIGHT:
            flat = self._optimizer().state[flat][kind]
        return flat.detach().narrow(0, offset, piece.stop - piece.start)

    def _copy(self, source: Source) -> None:
        self._partition_persistent()
        for piece in self.slices:
            self._copy_slice(source, piece)
            # What the model computes with, in its precision.
            weights = self._read(WEIGHT, piece)
            held = self.parameters[piece.name].ds_tensor.data
            held[: weights.numel()].copy_(weights)

    def _copy_slice(self, source: Source, piece: TensorSlice) -> None:
        for kind in (WEIGHT, *MOMENTS):
            values = source(kind, piece.name, piece.start, piece.stop)
            self._read(kind, piece).copy_(values)

    def _partition_persistent(self) -> None:
        """Let go of the old values of small parameters, kept whole between steps."""
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)

    def settle(self) -> None:
        self._zero.checkpoint_event_epilogue()


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

    @contextlib.contextmanager
    def _in_memory(self, group: int, *, changed: bool) -> Iterator[None]:
        """Have a sub-group in memory, and write it back if it is changed."""
        swapped = self._zero._swappable_optimizer_subgroup(group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            if swapped and changed:
                self._zero._optimizer_states_and_gradient_swap_out(group)
            elif swapped:
                self._zero._release_swap_buffers(group)

    def values(self, kinds: Sequence[str]) -> Iterator[tuple[TensorSlice, str, Tensor]]:
        for group, pieces in enumerate(self._slices_of):
            with self._in_memory(group, changed=False):
                for piece in pieces:
                    for kind in kinds:
                        yield piece, kind, self._read(kind, piece)

    def _make_moments(self, steps: int) -> None:
        for group, key in enumerate(self._stepped()):
            with self._in_memory(group, changed=True):
                self._make_moments_of(key, steps)

    def _copy(self, source: Source) -> None:
        self._partition_persistent()
        for group, pieces in enumerate(self._slices_of):
            with self._in_memory(group, changed=True):
                for piece in pieces:
                    self._copy_slice(source, piece)
                # What the model computes with, in its precision.
                self._zero._reassign_or_swap_out_partitioned_parameters(group)


def held_state(engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> HeldState:
    """What this rank holds, at the ZeRO stage of `engine`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Replicated(engine, ranks)
    if stage < 3:
        return _Partitioned(engine)
    swapped = engine.optimizer.swap_optimizer
    return _Swapped(engine) if swapped else _Sharded(engine)

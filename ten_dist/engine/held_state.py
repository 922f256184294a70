"""What a rank holds of the weights and moments of a run, at every ZeRO stage.

ZeRO cuts parameters up in its own ways: at stages 1 and 2 the parameters of a group form
one flat vector, of which each rank holds an equal range in float32; at stage 3 each rank
holds an equal range of each parameter. Here all of them are ranges of elements of named
tensors, which is all that a checkpoint knows of
(:class:`ten_dist.checkpoint.TensorSlice`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
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
    """

    slices: list[TensorSlice]

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        module = engine.module
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())
        self.shapes = {
            name: torch.Size(getattr(tensor, "ds_shape", tensor.shape))
            for name, tensor in (self.parameters | self.buffers).items()
        }

    @abc.abstractmethod
    def read(self, kind: str, piece: TensorSlice) -> Tensor:
        """Values of one of `slices`, flat; possibly a view of what training changes.

        Moments are there after the first update, or after :meth:`prepare`.
        """

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
        optimizer = self._optimizer()
        for key in self._stepped():
            state = optimizer.state[key]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(key, requires_grad=False))
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

    def read(self, kind: str, piece: TensorSlice) -> Tensor:
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

    def read(self, kind: str, piece: TensorSlice) -> Tensor:
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
                self.read(kind, piece).copy_(values)


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

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _stepped(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def read(self, kind: str, piece: TensorSlice) -> Tensor:
        parameter = self.parameters[piece.name]
        if kind == WEIGHT:
            values = safe_get_local_fp32_param(parameter)
        else:
            values = safe_get_local_optimizer_state(parameter, kind)
        return values.detach()[: piece.stop - piece.start]

    def _copy(self, source: Source) -> None:
        persistent = self._zero.persistent_parameters
        if persistent:
            # Small parameters are kept whole between steps: let go of the old values.
            persistent[0].partition(persistent)
        for piece in self.slices:
            parameter = self.parameters[piece.name]
            padded = torch.zeros(parameter.partition_numel())
            for kind in (WEIGHT, *MOMENTS):
                values = source(kind, piece.name, piece.start, piece.stop)
                padded[: values.numel()] = values
                if kind == WEIGHT:
                    safe_set_local_fp32_param(parameter, padded)
                    parameter.ds_tensor.data.copy_(padded)
                else:
                    safe_set_local_optimizer_state(parameter, padded, kind)

    def settle(self) -> None:
        self._zero.checkpoint_event_epilogue()


def held_state(engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> HeldState:
    """What this rank holds, at the ZeRO stage of `engine`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Replicated(engine, ranks)
    return _Sharded(engine) if stage == 3 else _Partitioned(engine)

"""One optimizer step on all ranks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data import Mixture, TokenBatch, batch_of_step
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Anomaly, Health
from ten_dist.engine.loss_scale import LossScale
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.engine.throughput import Throughput
from ten_dist.monitor.run_monitor import memory_metrics
from ten_dist.optimizer.muon import RATE_FACTOR


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What came of a step; the same on all ranks but for memory and rows."""

    metrics: dict[str, Any]
    """Under the names of metrics.jsonl."""
    anomaly: Anomaly | None
    """What was wrong with it."""
    overflowed: bool
    """Whether it was not applied because the loss scale was too large."""
    stop_requested: bool
    """Whether any rank was asked to stop."""
    rows: list[TokenBatch]
    """The micro-batches of this rank."""


@dataclasses.dataclass
class _Accumulated:
    """What the micro-batches of a step have added up to on this rank."""

    losses: Tensor
    """[losses], sums."""
    by_source: Tensor
    """[2, sources], sums of row losses, and numbers of rows; with a loss mask each row as
    often as it has targets that count."""
    rows: list[TokenBatch]
    data_seconds: float = 0.0
    counted_tokens: int | None = None
    """Targets that count on all ranks, with a loss mask."""


@dataclasses.dataclass
class Stepper:
    """Does the steps of a run, one at a time. Every rank has one."""

    engine: deepspeed.DeepSpeedEngine
    ranks: Ranks
    run: ResolvedRun
    stop: StopSignals
    """Tells whether this rank was asked to stop."""
    health: Health
    """Decides whether a step updates the weights."""
    loss_scale: LossScale | None = None
    """That of training in float16, told how each step went."""
    reporter: Reporter = dataclasses.field(default_factory=Reporter)
    """Told of each phase of a step, and of the rows that it takes."""
    before_update: Callable[[], None] = lambda: None
    """Called before anything changes a weight or a moment."""

    def __post_init__(self) -> None:
        self._schedule = self.run.schedule
        self._throughput = Throughput.of(self.run, self.ranks)
        self._sharded = self.engine.zero_optimization()
        data = self.run.data
        self._masked = data is not None and data.masked
        self._mixture = data if isinstance(data, Mixture) else None
        self._sources = self._mixture.names if self._mixture else ()
        self._losses = ["loss", "ce_loss", "energy_loss"]
        if self.run.model_config.z_loss_weight:
            self._losses.append("z_loss")

    def __call__(
        self, number: int, batches: Iterator[TokenBatch], excluded: Sequence[int] = ()
    ) -> StepResult:
        """Do a step.

        Args:
            number: of the step, from 1.
            batches: this rank's micro-batches, of which those of a step are taken.
            excluded: global batches that were left out.
        """
        started = time.perf_counter()
        learning_rate = self._schedule.learning_rate(number - 1)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)
        scale = 1.0
        if self.loss_scale is not None:
            scale = self.loss_scale.value
            if self._sharded:
                # ZeRO takes it into account in the norm, in clipping and in the update.
                self.engine.optimizer.override_loss_scale(scale)
        sums, loss = self._accumulate(number, batches, scale)
        # All ranks stop together.
        stop = sums.losses.new_tensor([float(self.stop.requested)])
        means = self.ranks.sum(torch.cat([sums.losses, stop]))
        means /= self._schedule.accumulation_steps * self.ranks.world_size
        gradient_norm = self._apply(number, loss * self.health.factor(means[0]), scale)
        *values, stops = means.tolist()
        losses = dict(zip(self._losses, values, strict=True))
        anomaly, overflowed = judge(
            self.health, self.loss_scale, losses["loss"], gradient_norm
        )
        scaling = {}
        if self.loss_scale is not None:
            overflowed_steps = self.loss_scale.overflowed_steps
            scaling = {"loss_scale": scale, "overflowed_steps": overflowed_steps}
        counted = {}
        if sums.counted_tokens is not None:
            counted = {"counted_tokens": sums.counted_tokens}
        seconds = time.perf_counter() - started
        metrics = {
            "step": number,
            "tokens": number * self._schedule.tokens_per_step,
            **counted,
            **losses,
            **self._source_metrics(batch_of_step(number, excluded), sums.by_source),
            "weighted_energy_loss": self.run.model_config.energy_reg_weight
            * losses["energy_loss"],
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "skipped_steps": self.health.skipped_steps,
            **scaling,
            **self._throughput.metrics(seconds, sums.data_seconds),
            **memory_metrics(),
        }
        return StepResult(metrics, anomaly, overflowed, stops > 0, sums.rows)

    def _accumulate(
        self, number: int, batches: Iterator[TokenBatch], scale: float
    ) -> tuple[_Accumulated, Tensor]:
        """Forward of all micro-batches, and backward of all but the last.

        Returns:
            Their sums, and the loss of the last, whose backward decides whether the
            weights are updated.
        """
        zeros = functools.partial(torch.zeros, device=self.engine.device)
        sums = _Accumulated(zeros(len(self._losses)), zeros(2, len(self._sources)), [])
        if self._masked:
            batches = self._count(number, batches, sums)
        loss = self._forward(number, batches, sums)
        for _ in range(self._schedule.accumulation_steps - 1):
            self._backward(loss, scale)
            self.reporter.enter("optimizer", number)
            # Counts the micro-batch; updates nothing before the last one.
            self.engine.step()
            loss = self._forward(number, batches, sums)
        return sums, loss

    def _count(
        self, number: int, batches: Iterator[TokenBatch], sums: _Accumulated
    ) -> Iterator[TokenBatch]:
        """Count the targets of a step, on all ranks, before the first backward of it.

        Returns:
            The micro-batches of the step.
        """
        self.reporter.enter("data", number)
        waited = time.perf_counter()
        step = list(itertools.islice(batches, self._schedule.accumulation_steps))
        sums.data_seconds += time.perf_counter() - waited
        own = sum(batch.counted_tokens for batch in step)
        total = torch.tensor([own], dtype=torch.float64, device=self.engine.device)
        sums.counted_tokens = int(self.ranks.sum(total).item())
        return iter(step)

    def _forward(
        self, number: int, batches: Iterator[TokenBatch], sums: _Accumulated
    ) -> Tensor:
        """Forward of the next micro-batch of a step; its loss, a scalar."""
        self.reporter.enter("data", number)
        waited = time.perf_counter()
        batch = next(batches)
        sums.data_seconds += time.perf_counter() - waited
        self.reporter.consumed(number, batch)
        self.reporter.enter("forward", number)
        self._seed(number, len(sums.rows))
        sums.rows.append(batch)
        device = self.engine.device
        targets = batch.targets.to(device)
        losses = self._losses_of(batch.inputs.to(device), targets)
        if sums.counted_tokens is not None:
            losses = self._weighted(losses, batch.counted_tokens, sums.counted_tokens)
        sums.losses += torch.stack([losses[name].detach() for name in self._losses])
        if self._sources:
            rows = losses["row_losses"]
            sources = torch.from_numpy(batch.sources).to(device)
            weights = rows.new_ones(len(rows))
            if self._masked:
                weights = (targets != IGNORED_TARGET).sum(dim=1).to(rows.dtype)
            counted = torch.stack([rows * weights, weights])
            sums.by_source.index_add_(1, sources, counted)
        self.reporter.enter("backward", number)
        return losses["loss"]

    def _weighted(
        self, losses: dict[str, Tensor], own: int, total: int
    ) -> dict[str, Tensor]:
        """Losses whose mean over the micro-batches of all ranks is that over all targets.

        Args:
            losses: of a micro-batch, means over its own targets that count.
            own: how many these are.
            total: how many there are in the step.
        """
        micro_batches = self._schedule.accumulation_steps * self.ranks.world_size
        weight = own * micro_batches / max(total, 1)
        of_tokens: dict[str, Tensor] = {
            name: losses[name] * weight
            for name in ("ce_loss", "z_loss")
            if name in losses
        }
        # Energy is that of states, at every position, whatever counts.
        energy = self.run.model_config.energy_reg_weight * losses["energy_loss"]
        return {**losses, **of_tokens, "loss": sum(of_tokens.values(), energy)}

    def _losses_of(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of a batch on the device, [B, T] int64 each."""
        return self.engine(inputs, targets=targets)

    def _backward(self, loss: Tensor, scale: float) -> None:
        # DeepSpeed divides by the number of accumulations.
        self.engine.backward(loss if self._sharded else loss * scale)

    def _apply(self, number: int, loss: Tensor, scale: float) -> float:
        """Backward of the last micro-batch, and the update unless its gradient is bad.

        Returns:
            The gradient norm before clipping; not finite where nothing was updated.
        """
        self._backward(loss, scale)
        gradient_norm = math.nan
        if not self._sharded:
            gradient_norm = self._averaged_gradient_norm(scale)
            if not math.isfinite(gradient_norm):
                # What DeepSpeed does at the other stages.
                self.engine.zero_grad()
                self.engine.micro_steps += 1
                return gradient_norm
        self.reporter.enter("optimizer", number)
        self.before_update()
        self.engine.step()
        if self._sharded:
            # Infinite, or None, where DeepSpeed has skipped the update.
            norm = self.engine.get_global_grad_norm()
            gradient_norm = math.nan if norm is None else float(norm)
        return gradient_norm

    def _seed(self, step: int, micro_step: int) -> None:
        """Seed dropout of a micro-batch by its place in the whole run.

        So it depends neither on where the run was interrupted nor on the number of ranks.
        """
        share = self._schedule.global_batch_size // self._schedule.micro_batch_size
        number = micro_step * self.ranks.world_size + self.ranks.rank
        seed = np.random.SeedSequence((self.run.training.seed, step * share + number))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def _averaged_gradient_norm(self, scale: float) -> float:
        """Divide the averaged gradient of stage 0 by the loss scale; its norm.

        DeepSpeed tells the norm of sharded gradients only.
        """
        gradients = [p.grad for p in self.engine.module.parameters()]
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        return torch.nn.utils.get_total_norm(gradients).item()

    def _source_metrics(self, batches: int, by_source: Tensor) -> dict[str, float]:
        """Of a mixture, the loss of each source in a step, and the epochs read so far.

        Args:
            batches: global batches that were read, or left out.
            by_source: of :class:`_Accumulated`.
        """
        if self._mixture is None:
            return {}
        metrics = {}
        sums, counts = self.ranks.sum(by_source).tolist()
        read = self._mixture.rows_before(batches * self._schedule.global_batch_size)
        epochs = self._mixture.rows(self._schedule.seq_len)
        for source, name in enumerate(self._sources):
            if counts[source]:
                metrics[f"ce_loss/{name}"] = sums[source] / counts[source]
            metrics[f"epochs/{name}"] = read[source] / epochs[source]
        return metrics


def judge(
    health: Health, loss_scale: LossScale | None, loss: float, gradient_norm: float
) -> tuple[Anomaly | None, bool]:
    """What was wrong with a step, and whether only the loss scale was; it adapts.

    Args:
        health, loss_scale: of the run.
        loss, gradient_norm: as of :meth:`Health.judge`.
    """
    overflowed = (
        loss_scale is not None
        and not loss_scale.at_floor
        and health.only_gradient_overflowed(loss, gradient_norm)
    )
    anomaly = None if overflowed else health.judge(loss, gradient_norm)
    if loss_scale is not None and (anomaly is None or anomaly.applied):
        loss_scale.update(overflowed)
    return anomaly, overflowed

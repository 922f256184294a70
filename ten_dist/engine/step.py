"""One optimizer step on all ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from ten_dist.data import Mixture, TokenBatch, batch_of_step
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.health import Anomaly, Health
from ten_dist.engine.loss_scale import LossScale
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stop_signals import StopSignals
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import peak_memory_bytes


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


class Stepper:
    """Does the steps of a run, one at a time. Every rank has one.

    Args:
        engine, ranks, run: of the training.
        stop: whether this rank was asked to stop.
        ledger: told of the rows of each step.
        enter: told of each phase of a step: data, forward, backward and optimizer.
        before_update: called before anything changes a weight or a moment.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        stop: StopSignals,
        ledger: Ledger | None,
        enter: Callable[[str, int], None] = lambda phase, step: None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._run = run
        self._schedule = run.schedule
        self._stop = stop
        self._ledger = ledger
        self._enter = enter
        self._before_update = before_update
        self._sources = run.data.names if isinstance(run.data, Mixture) else ()
        self._losses = ["loss", "ce_loss", "energy_loss"]
        if run.model_config.z_loss_weight:
            self._losses.append("z_loss")

    def _losses_of(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of a batch on the device, [B, T] int64 each."""
        return self._engine(inputs, targets=targets)

    def __call__(
        self,
        number: int,
        batches: Iterator[TokenBatch],
        health: Health,
        excluded: list[int],
        loss_scale: LossScale | None = None,
    ) -> StepResult:
        """Do step `number`, from 1.

        Args:
            number: of the step.
            batches: this rank's micro-batches; those of a step are taken.
            health: decides whether the weights are updated.
            excluded: global batches that were left out.
            loss_scale: that of training in float16, told how the step went.
        """
        started = time.perf_counter()
        engine, schedule = self._engine, self._schedule
        learning_rate = schedule.learning_rate(number - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        data_seconds = 0.0
        totals = torch.zeros(len(self._losses), device=engine.device)
        by_source = torch.zeros(2, max(1, len(self._sources)), device=engine.device)
        sharded = engine.zero_optimization()
        scale = 1.0 if loss_scale is None else loss_scale.value
        if sharded and loss_scale is not None:
            # ZeRO then scales the loss, and looks at the norm, clips and updates without.
            engine.optimizer.override_loss_scale(scale)
        taken = []
        for micro_step in range(schedule.accumulation_steps):
            self._enter("data", number)
            waited = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - waited
            taken.append(batch)
            if self._ledger is not None:
                self._ledger.write(number, batch.sources, batch.epochs, batch.rows)
            self._enter("forward", number)
            self._seed(number, micro_step)
            losses = self._losses_of(
                batch.inputs.to(engine.device), batch.targets.to(engine.device)
            )
            totals += torch.stack([losses[name].detach() for name in self._losses])
            if self._sources:
                rows = losses["row_losses"]
                sources = torch.from_numpy(batch.sources).to(engine.device)
                by_source.index_add_(
                    1, sources, torch.stack([rows, rows.new_ones(len(rows))])
                )
            self._enter("backward", number)
            loss = losses["loss"]
            last = micro_step + 1 == schedule.accumulation_steps
            if last:
                means = self._over_ranks(totals)
                loss = loss * health.factor(means[0])
            # DeepSpeed divides by the number of accumulations.
            engine.backward(loss if sharded else loss * scale)
            if last and not sharded:
                gradient_norm = self._averaged_gradient_norm(scale)
                if not math.isfinite(gradient_norm):
                    self._drop_gradients()
                    continue
            self._enter("optimizer", number)
            if last:
                self._before_update()
            engine.step()
        *values, stops = means.tolist()
        losses = dict(zip(self._losses, values, strict=True))
        if sharded:
            norm = engine.get_global_grad_norm()
            # Infinite, or None, where DeepSpeed has skipped the update.
            gradient_norm = math.nan if norm is None else float(norm)
        anomaly, overflowed = _judge(health, loss_scale, losses["loss"], gradient_norm)
        seconds = time.perf_counter() - started
        metrics = {
            "step": number,
            "tokens": number * schedule.tokens_per_step,
            **losses,
            **self._source_metrics(batch_of_step(number, excluded), by_source),
            "weighted_energy_loss": self._run.model_config.energy_reg_weight
            * losses["energy_loss"],
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "skipped_steps": health.skipped_steps,
            **_scale_metrics(scale, loss_scale),
            "tokens_per_second": schedule.tokens_per_step / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(),
        }
        return StepResult(metrics, anomaly, overflowed, stops > 0, taken)

    def _over_ranks(self, totals: Tensor) -> Tensor:
        """Means of summed losses, and whether to stop, which no rank may do by itself."""
        stop = totals.new_tensor([float(self._stop.requested)])
        summed = self._ranks.sum(torch.cat([totals, stop]))
        return summed / (self._schedule.accumulation_steps * self._ranks.world_size)

    def _seed(self, step: int, micro_step: int) -> None:
        """Make the random numbers of a micro-batch, dropout's, a function of its place.

        The place in the whole run, so that they depend neither on where the run was
        interrupted nor on the number of ranks.
        """
        share = self._schedule.global_batch_size // self._schedule.micro_batch_size
        number = micro_step * self._ranks.world_size + self._ranks.rank
        seed = np.random.SeedSequence((self._run.training.seed, step * share + number))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def _averaged_gradient_norm(self, scale: float) -> float:
        """Norm of the gradient at stage 0, after its last accumulation.

        DeepSpeed tells the norm of sharded gradients only. Here every rank holds the
        whole averaged gradient, before clipping. It is divided by the loss scale.
        """
        gradients = [p.grad for p in self._engine.module.parameters()]
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        return torch.nn.utils.get_total_norm(gradients).item()

    def _drop_gradients(self) -> None:
        """End a step without an update at stage 0, as DeepSpeed does it at the others."""
        self._engine.zero_grad()
        self._engine.micro_steps += 1

    def _source_metrics(self, batches: int, by_source: Tensor) -> dict[str, float]:
        """Of a mixture, the loss of each source in a step, and the epochs read so far.

        Args:
            batches: global batches that were read, or left out.
            by_source: [2, sources], sum of this rank's row losses, and number of rows.
        """
        if not self._sources:
            return {}
        metrics = {}
        sums, counts = self._ranks.sum(by_source).tolist()
        read = self._run.data.rows_before(batches * self._schedule.global_batch_size)
        epochs = self._run.data.rows(self._schedule.seq_len)
        for source, name in enumerate(self._sources):
            if counts[source]:
                metrics[f"ce_loss/{name}"] = sums[source] / counts[source]
            metrics[f"epochs/{name}"] = read[source] / epochs[source]
        return metrics


def _judge(
    health: Health, loss_scale: LossScale | None, loss: float, gradient_norm: float
) -> tuple[Anomaly | None, bool]:
    """What was wrong with a step, and whether that was only the loss scale."""
    overflowed = (
        loss_scale is not None
        and not loss_scale.at_floor
        and health.only_gradient_overflowed(loss, gradient_norm)
    )
    anomaly = None if overflowed else health.judge(loss, gradient_norm)
    applied = anomaly is None or anomaly.applied
    if loss_scale is not None and applied:
        loss_scale.update(overflowed)
    return anomaly, overflowed


def _scale_metrics(scale: float, loss_scale: LossScale | None) -> dict[str, float]:
    """That which a step had, and how often it was too large so far."""
    if loss_scale is None:
        return {}
    return {"loss_scale": scale, "overflowed_steps": loss_scale.overflowed_steps}

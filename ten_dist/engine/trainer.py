"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch

from ten_dist.data import (
    TokenBatch,
    evaluation_batches,
    training_batches,
)
from ten_dist.engine.checkpoints import save_checkpoint
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import DataError, TrainingError
from ten_dist.evaluate import evaluate
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import RunMonitor, SilentMonitor, peak_memory_bytes
from ten_dist.run_folder import RunFolder

_LOSSES = ("loss", "ce_loss", "energy_loss")


class Trainer:
    """Runs the steps of a plan on a DeepSpeed engine.

    Steps are counted from 1 in everything a user sees: step n is the n-th update, and a
    checkpoint of step n has done n of them.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        folder: RunFolder,
        monitor: RunMonitor | SilentMonitor,
        ledger: Ledger | None,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.training = run.training
        self.plan = run.plan
        self.manifest = run.manifest
        self.val_manifest = run.val_manifest
        self.folder = folder
        self.monitor = monitor
        self.ledger = ledger
        self._energy_weight = run.model_config.energy_reg_weight

    def fit(self, steps_done: int) -> dict[str, Any]:
        """Train from `steps_done` to the end of the plan.

        Returns:
            Metrics of the last step and of the last validation.

        Raises:
            TrainingError: the loss is not finite, or a shard cannot be read.
        """
        plan, training = self.plan, self.training
        final: dict[str, Any] = {"step": steps_done}
        batches = training_batches(
            self.manifest,
            seq_len=plan.seq_len,
            seed=training.seed,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            first_step=steps_done,
            last_step=plan.steps,
            num_workers=training.num_workers,
        )
        for done in range(steps_done + 1, plan.steps + 1):
            metrics = self._step(done, batches)
            self.monitor.step(metrics)
            final.update(metrics)
            last = done == plan.steps
            if self.val_manifest and (last or done % training.eval_interval == 0):
                evaluation = {"step": done, **self.validate()}
                self.monitor.validation(evaluation)
                final.update(evaluation)
            if last or done % training.checkpoint_interval == 0:
                save_checkpoint(
                    self.engine,
                    self.ranks,
                    self.folder,
                    done,
                    done * plan.global_batch_size,
                )
        return final

    def _step(self, number: int, batches: Iterator[TokenBatch]) -> dict[str, Any]:
        """One optimizer step; what it returns is the same on all ranks but memory."""
        started = time.perf_counter()
        engine, plan = self.engine, self.plan
        learning_rate = plan.learning_rate(number - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        data_seconds = 0.0
        totals = torch.zeros(3, device=engine.device)
        for micro_step in range(plan.accumulation_steps):
            waited = time.perf_counter()
            batch = self._next_batch(batches)
            data_seconds += time.perf_counter() - waited
            if self.ledger is not None:
                self.ledger.write(number, batch.epochs, batch.rows)
            losses = engine(
                batch.inputs.to(engine.device), targets=batch.targets.to(engine.device)
            )
            # DeepSpeed divides by the number of accumulations.
            engine.backward(losses["loss"])
            totals += torch.stack([losses[name].detach() for name in _LOSSES])
            gradient_norm = self._unsharded_gradient_norm(micro_step)
            engine.step()
        loss, ce_loss, energy_loss = (
            self.ranks.mean(totals) / plan.accumulation_steps
        ).tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {number} is {loss} (cross-entropy {ce_loss}, energy "
                f"{energy_loss}): lower --learning_rate, and continue from the "
                "checkpoint before it"
            )
        if gradient_norm is None:
            gradient_norm = engine.get_global_grad_norm()
        seconds = time.perf_counter() - started
        return {
            "step": number,
            "tokens": number * plan.tokens_per_step,
            "loss": loss,
            "ce_loss": ce_loss,
            "energy_loss": energy_loss,
            "weighted_energy_loss": self._energy_weight * energy_loss,
            "learning_rate": learning_rate,
            "gradient_norm": float(gradient_norm),
            "tokens_per_second": plan.tokens_per_step / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(),
        }

    @staticmethod
    def _next_batch(batches: Iterator[TokenBatch]) -> TokenBatch:
        try:
            return next(batches)
        except DataError as error:
            # Not a wrong option any more: the data was whole when the run started.
            raise TrainingError(f"{error}; then start again to continue") from error

    def _unsharded_gradient_norm(self, micro_step: int) -> float | None:
        """Norm of the whole gradient before clipping, where DeepSpeed does not give it.

        It does for sharded gradients; at stage 0 each rank holds the averaged gradient
        when the last accumulation has been added.
        """
        if self.engine.zero_optimization():
            return None
        if micro_step + 1 < self.plan.accumulation_steps:
            return math.nan
        gradients = [p.grad for p in self.engine.module.parameters()]
        return torch.nn.utils.get_total_norm(gradients).item()

    def validate(self) -> dict[str, float]:
        """Held-out figures on the validation data; every rank must call this."""
        assert self.val_manifest is not None
        self.engine.eval()
        batches = evaluation_batches(
            self.val_manifest,
            seq_len=self.plan.seq_len,
            micro_batch_size=self.plan.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_rows=self.training.eval_rows or None,
        )
        evaluation = evaluate(
            lambda inputs, targets: self.engine(inputs, targets=targets),
            batches,
            self.val_manifest,
            self.engine.device,
            self.ranks.sum,
        )
        self.engine.train()
        return evaluation.metrics()

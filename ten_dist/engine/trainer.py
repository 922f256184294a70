"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ten_dist.data import (
    Manifest,
    Mixture,
    TokenBatch,
    evaluation_batches,
    training_batches,
)
from ten_dist.engine.checkpoints import save_checkpoint
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.stragglers import Stragglers
from ten_dist.errors import DataError, TrainingError
from ten_dist.evaluate import Evaluation, combine, evaluate
from ten_dist.model.precision import autocast
from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.run_monitor import RunMonitor, SilentMonitor, peak_memory_bytes
from ten_dist.monitor.watchdog import NoWatchdog, Watchdog
from ten_dist.run_folder import RunFolder


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
        watchdog: Watchdog | NoWatchdog,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.run = run
        self.training = run.training
        self.plan = run.plan
        self.data = run.data
        self.validation = run.validation
        self.folder = folder
        self.monitor = monitor
        self.ledger = ledger
        self.watchdog = watchdog
        self.stragglers = Stragglers(
            ranks, run.training.straggler_interval, engine.device
        )
        self._energy_weight = run.model_config.energy_reg_weight
        self._sources = run.data.names if isinstance(run.data, Mixture) else ()
        self._losses = ["loss", "ce_loss", "energy_loss"]
        if run.model_config.z_loss_weight:
            self._losses.append("z_loss")

    def fit(self, steps_done: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Train from `steps_done` to the end of the plan.

        Args:
            steps_done: where a checkpoint has brought the run, or 0.
            metrics: what it says of its last step and last validation.

        Returns:
            Metrics of the last step and of the last validation.

        Raises:
            TrainingError: loss or gradient is not finite, or a file cannot be read or
                written.
        """
        plan, training = self.plan, self.training
        final = dict(metrics)
        batches = training_batches(
            self.data,
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
        batches = _readable(batches)
        for done in range(steps_done + 1, plan.steps + 1):
            step_metrics = self._step(done, batches)
            step_metrics |= self.stragglers.end_step(done, step_metrics["step_seconds"])
            self.monitor.step(step_metrics)
            final.update(step_metrics)
            last = done == plan.steps
            if self.validation and (last or done % training.eval_interval == 0):
                evaluation = {"step": done, **self.validate(done)}
                self.monitor.validation(evaluation)
                final.update(evaluation)
            if last or done % training.checkpoint_interval == 0:
                self.watchdog.progress("checkpoint", done)
                save_checkpoint(
                    self.engine, self.ranks, self.run, self.folder, done, final
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
        totals = torch.zeros(len(self._losses), device=engine.device)
        by_source = torch.zeros(2, max(1, len(self._sources)), device=engine.device)
        sharded = engine.zero_optimization()
        for micro_step in range(plan.accumulation_steps):
            self._enter("data", number)
            waited = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - waited
            if self.ledger is not None:
                self.ledger.write(number, batch.sources, batch.epochs, batch.rows)
            self._enter("forward", number)
            losses = self._losses_of(
                batch.inputs.to(engine.device), batch.targets.to(engine.device)
            )
            self._enter("backward", number)
            # DeepSpeed divides by the number of accumulations.
            engine.backward(losses["loss"])
            totals += torch.stack([losses[name].detach() for name in self._losses])
            if self._sources:
                rows = losses["row_losses"]
                sources = torch.from_numpy(batch.sources).to(engine.device)
                by_source.index_add_(
                    1, sources, torch.stack([rows, rows.new_ones(len(rows))])
                )
            if micro_step + 1 == plan.accumulation_steps and not sharded:
                gradient_norm = self._averaged_gradient_norm()
            self._enter("optimizer", number)
            engine.step()
        means = (self.ranks.mean(totals) / plan.accumulation_steps).tolist()
        losses = dict(zip(self._losses, means, strict=True))
        loss, energy_loss = losses["loss"], losses["energy_loss"]
        if sharded:
            norm = engine.get_global_grad_norm()
            # None where DeepSpeed has skipped the update.
            gradient_norm = math.nan if norm is None else float(norm)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            newest = self.folder.newest_checkpoint()
            raise TrainingError(
                f"step {number} is not finite: {losses}, gradient norm {gradient_norm}. "
                "Nothing of it was saved; go on in another --output_dir with a lower "
                "--learning_rate"
                + (f" and --resume {newest}" if newest is not None else "")
            )
        seconds = time.perf_counter() - started
        return {
            "step": number,
            "tokens": number * plan.tokens_per_step,
            **losses,
            **self._source_metrics(number, by_source),
            "weighted_energy_loss": self._energy_weight * energy_loss,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens_per_second": plan.tokens_per_step / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(),
        }

    def _enter(self, phase: str, step: int) -> None:
        """Tell whoever watches what a step does next."""
        self.watchdog.progress(phase, step)
        self.stragglers.enter(phase)

    def _source_metrics(self, step: int, by_source: Tensor) -> dict[str, float]:
        """Of a mixture, the loss of each source in a step, and the epochs read so far.

        Args:
            step: its number, from 1.
            by_source: [2, sources], sum of this rank's row losses, and number of rows.
        """
        if not self._sources:
            return {}
        metrics = {}
        sums, counts = self.ranks.sum(by_source).tolist()
        read = self.data.rows_before(step * self.plan.global_batch_size)
        epochs = self.data.rows(self.plan.seq_len)
        for source, name in enumerate(self._sources):
            if counts[source]:
                metrics[f"ce_loss/{name}"] = sums[source] / counts[source]
            metrics[f"epochs/{name}"] = read[source] / epochs[source]
        return metrics

    def _losses_of(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with autocast(self.engine.device, self.training.precision):
            return self.engine(inputs, targets=targets)

    def _averaged_gradient_norm(self) -> float:
        """Norm of the gradient at stage 0, after its last accumulation.

        DeepSpeed tells the norm of sharded gradients only. Here every rank holds the
        whole averaged gradient, before clipping.
        """
        gradients = [p.grad for p in self.engine.module.parameters()]
        return torch.nn.utils.get_total_norm(gradients).item()

    def validate(self, step: int) -> dict[str, float]:
        """Held-out figures on the validation data; every rank must call this.

        Of a mixture, those of each source's held-out set, and of all in its proportions.

        Args:
            step: optimizer steps done.
        """
        self.engine.eval()
        results = {
            name: self._evaluate(held_out, step)
            for name, held_out in self.validation.items()
        }
        self.engine.train()
        if "" in results:
            return results[""].metrics()
        shares = dict(zip(self.data.names, self.data.shares))
        weights = [shares[name] for name in results]
        return {
            **combine(list(results.values()), weights).metrics(),
            **{f"val_loss/{name}": result.loss for name, result in results.items()},
        }

    def _evaluate(self, held_out: Manifest, step: int) -> Evaluation:
        batches = evaluation_batches(
            held_out,
            seq_len=self.plan.seq_len,
            micro_batch_size=self.plan.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_rows=self.training.eval_rows or None,
        )
        return evaluate(
            self._losses_of,
            self._watched(_readable(batches), step),
            held_out,
            self.engine.device,
            self.ranks.sum,
        )

    def _watched(
        self, batches: Iterator[TokenBatch], step: int
    ) -> Iterator[TokenBatch]:
        """Batches of a validation, each of them progress."""
        self.watchdog.progress("validation", step)
        for batch in batches:
            yield batch
            self.watchdog.progress("validation", step)


def _readable(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
    """`batches`, with damage reported as what it is by now.

    The data was whole when the run started, so this is no wrong option any more.
    """
    try:
        yield from batches
    except DataError as error:
        raise TrainingError(f"{error}; then start again to continue") from error

"""Everything rank 0 reports of a run: metrics.jsonl, TensorBoard, progress bar."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from tqdm import tqdm

from ten_dist.monitor.event_file import EventFile
from ten_dist.monitor.metrics_log import MetricsLog
from ten_dist.monitor.run_description import describe
from ten_dist.monitor.spending import Spending
from ten_dist.monitor.trackers.tracker_process import TrackerProcess
from ten_dist.run_folder import RunFolder

TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "ce_loss": "train/ce_loss",
    "energy_loss": "train/energy_raw",
    "weighted_energy_loss": "train/energy_weighted",
    "z_loss": "train/z_loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_device": "speed/tokens_per_second_per_device",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "counted_tokens": "data/counted_tokens",
    "data_seconds": "speed/data_seconds",
    "data_share": "speed/data_share",
    "communication_share": "speed/communication_share",
    "memory_bytes": "speed/memory_bytes",
    "memory_reserved_bytes": "speed/memory_reserved_bytes",
    "skipped_steps": "health/skipped_steps",
    "loss_scale": "health/loss_scale",
    "overflowed_steps": "health/overflowed_steps",
    "energy_bound_ratio": "health/energy_bound_ratio",
    "eigenvalue_distance": "health/eigenvalue_distance",
    "checkpoint_held_seconds": "checkpoint/held_seconds",
    "checkpoint_write_seconds": "checkpoint/write_seconds",
    "checkpoint_bytes": "checkpoint/bytes",
    "slowest_rank_seconds": "speed/slowest_rank_seconds",
    "median_rank_seconds": "speed/median_rank_seconds",
    "val_loss": "validation/loss",
    "val_perplexity": "validation/perplexity",
    "val_bits_per_byte": "validation/bits_per_byte",
    "dollars": "cost/dollars",
    "estimated_dollars": "cost/estimated_dollars",
}
"""Where TensorBoard shows a metric of metrics.jsonl; docs/run_folder.md#metrics says what
each one means."""
_OF_SOURCES = {
    "ce_loss": "train/ce_loss",
    "epochs": "data/epochs",
    "val_loss": "validation/loss",
    # Of a layer and a scale.
    "energy": "analysis/energy",
    # Of a task and what is measured of it.
    "task": "tasks",
}


class RunMonitor:
    """Reports steps and validations of one start of a run.

    Args:
        folder: the run.
        first_step: steps done before this start.
        last_step: steps of the whole run.
        dollars_per_hour: price of all machines of the run, or None where not known.
        tracker: that of `--tracker`; it is told what TensorBoard is, and closed.
    """

    def __init__(
        self,
        folder: RunFolder,
        first_step: int,
        last_step: int,
        dollars_per_hour: float | None = None,
        tracker: TrackerProcess | None = None,
    ) -> None:
        self._tracker = tracker
        self._folder = folder
        # Before lines of steps that will be done again are removed: they were paid.
        self._spending = Spending(dollars_per_hour, folder.metrics_file, last_step)
        self._open(first_step)
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def _open(self, first_step: int) -> None:
        self._log = MetricsLog(self._folder.metrics_file, first_step)
        self._events = EventFile(self._folder.tensorboard, first_step)
        name = self._folder.path.resolve().name
        for summary in describe(self._folder.read(), name):
            self._events.show(0, summary)
        self._spending.begin(first_step)
        dollars = self.total_dollars(first_step)
        if dollars is not None:
            # Also of steps that will be done again, whose lines were just removed.
            self._record({"step": first_step, "dollars": dollars})

    def rewind(self, step: int) -> None:
        """Go back to where `step` steps were done: later ones will be done again."""
        self._events.close()
        self._log.close()
        self._open(step)
        self._bar.n = step
        self._bar.refresh()

    def step(self, metrics: dict[str, Any]) -> None:
        """Report an optimizer step; `metrics` has step and the names of metrics.jsonl."""
        cost = self._spending.metrics(metrics["step"])
        self._record(metrics | cost)
        words = (
            f"ce {metrics['ce_loss']:.4f}, energy {metrics['energy_loss']:.4f}, "
            f"loss {metrics['loss']:.4f}, lr {metrics['learning_rate']:.2e}, "
            f"{metrics['tokens_per_second']:,.0f} tok/s"
        )
        if "mfu" in metrics:
            words += f", MFU {100 * metrics['mfu']:.1f} %"
        if cost:
            words += f", ${cost['dollars']:.2f} of ${cost['estimated_dollars']:.2f}"
        # refresh=False leaves the pace of drawing to update().
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(1)

    def record(self, metrics: dict[str, Any]) -> None:
        """Report a validation, benchmarks, a complete checkpoint, or the recurrence at one.

        Args:
            metrics: step, and the figures by the names of metrics.jsonl.
        """
        self._record(metrics)
        if "val_loss" in metrics:
            words = (
                f"validation loss {metrics['val_loss']:.4f}, "
                f"perplexity {metrics['val_perplexity']:.2f}, "
                f"{metrics['val_bits_per_byte']:.4f} bits per byte"
            )
        elif "checkpoint_bytes" in metrics:
            words = (
                f"saved {metrics['checkpoint_bytes'] / 1e9:.3g} GB in "
                f"{metrics['checkpoint_write_seconds']:.2f} s, of which training waited "
                f"{metrics['checkpoint_held_seconds']:.2f} s"
            )
        else:
            tasks = {
                name.removeprefix("task/"): value
                for name, value in metrics.items()
                if name.startswith("task/")
            }
            if not tasks:
                return
            words = ", ".join(f"{name} {value:.4f}" for name, value in tasks.items())
        tqdm.write(f"step {metrics['step']:,}: {words}", file=sys.stdout)

    def show(self, step: int, summary: Summary) -> None:
        """Show histograms and pictures on TensorBoard."""
        self._events.show(step, summary)

    def total_dollars(self, step: int) -> float | None:
        """Cost of the run after `step` steps; None where the price is not known."""
        return self._spending.metrics(step).get("dollars")

    def _record(self, metrics: dict[str, Any]) -> None:
        self._log.write(metrics)
        scalars: dict[str, float] = {}
        for name, value in metrics.items():
            # Of a mixture, `ce_loss/code` is the loss of its source `code`.
            kind, _, source = name.partition("/")
            tag = TENSORBOARD_TAGS.get(name)
            if source:
                tag = f"{_OF_SOURCES.get(kind)}/{source}"
            if tag is not None and value is not None and math.isfinite(value):
                scalars[tag] = value
        self._events.write(metrics["step"], scalars)
        if self._tracker is not None:
            self._tracker.write(metrics["step"], scalars)

    def close(self) -> None:
        """Finish the bar and bring everything to the disk."""
        self._bar.close()
        self._events.close()
        self._log.close()
        if self._tracker is not None:
            self._tracker.close()


def memory_metrics() -> dict[str, int]:
    """Peak memory of this process: the GPU's where there is one, with what its allocator
    holds; else the host's."""
    if torch.cuda.is_available():
        return {
            "memory_bytes": torch.cuda.max_memory_allocated(),
            "memory_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    # Linux counts kibibytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": peak * 1024}

"""Arithmetic of a run, in one place: batch, length and learning rate."""

from __future__ import annotations

import dataclasses
import math

from ten_dist.config.training import TrainingConfig
from ten_dist.data import BatchShape, Manifest, Mixture, accumulation_steps
from ten_dist.errors import ConfigurationError

LARGEST_DEFAULT_MICRO_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run will do, derived from its options, its data and the number of ranks."""

    world_size: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    steps: int
    warmup_steps: int
    peak_learning_rate: float
    min_learning_rate: float
    rows_per_epoch: int | None
    """Rows in one pass over the data, or None without data (a dry run) or with a mixture,
    whose sources end at different times."""

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.global_batch_size * self.seq_len

    def batch_shape(self, rank: int) -> BatchShape:
        """Rows of a step as one rank reads them."""
        return BatchShape(
            self.seq_len,
            self.micro_batch_size,
            rank,
            self.world_size,
            self.accumulation_steps,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, 0-based.

        Linear over the warm-up to the peak, then a cosine to the minimum, which the
        last step reaches.
        """
        if step < self.warmup_steps:
            return self.peak_learning_rate * ((step + 1) / self.warmup_steps)
        remaining = max(1, self.steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        span = self.peak_learning_rate - self.min_learning_rate
        return self.min_learning_rate + span * cosine

    def describe_extension(self, before: Schedule, done: int) -> str:
        """What becomes of a run that had the length of another schedule, in words.

        Args:
            before: its schedule until now.
            done: steps that it has done.
        """
        length = f"extended from {before.steps:,} to {self.steps:,} steps"
        if done == 0:
            return f"{length}, none of which is done"
        if done >= self.steps:
            return f"{length}, all of which are done"
        old, new = before.learning_rate(done - 1), self.learning_rate(done)
        return (
            f"{length}: from step {done + 1:,} on the learning rate is that of a run of "
            f"{self.steps:,} steps, {old:.3g} at step {done:,} and {new:.3g} at the next; "
            "moments and the order of the data go on"
        )

    def describe(self) -> list[str]:
        """The arithmetic in words, one line a fact."""
        tokens = self.steps * self.tokens_per_step
        length = f"{self.steps:,} steps x {self.tokens_per_step:,} = {tokens:,} tokens"
        if self.rows_per_epoch:
            epochs = self.steps * self.global_batch_size / self.rows_per_epoch
            length += f" = {epochs:.2f} epochs of {self.rows_per_epoch:,} rows"
        return [
            (
                f"batch: {self.global_batch_size} rows = {self.micro_batch_size} a "
                f"micro-batch x {self.accumulation_steps} accumulations x "
                f"{self.world_size} ranks"
            ),
            (
                f"step: {self.global_batch_size} rows x {self.seq_len} tokens = "
                f"{self.tokens_per_step:,} tokens"
            ),
            f"run: {length}",
            (
                f"learning rate: {self.warmup_steps} steps up to "
                f"{self.peak_learning_rate:g}, then a cosine to {self.min_learning_rate:g}"
            ),
        ]


def make_schedule(
    training: TrainingConfig, world_size: int, data: Manifest | Mixture | None
) -> Schedule:
    """Derive the plan of a run.

    Args:
        training: options of the run.
        world_size: number of ranks.
        data: the training data, or None in a dry run without data.

    Raises:
        ConfigurationError: the batch does not divide over the ranks and micro-batches,
            the warm-up is longer than the run, or the data is a mixture and the run's
            length is to be counted in epochs of it.
        DataError: the data has no row of this length.
    """
    micro = training.micro_batch_size or largest_micro_batch(
        training.global_batch_size, world_size
    )
    accumulation = accumulation_steps(training.global_batch_size, micro, world_size)
    rows = None
    if isinstance(data, Mixture):
        data.rows(training.seq_len)
        if not (training.steps or training.tokens):
            raise ConfigurationError(
                "--epochs says nothing of a mixture, whose sources end at different "
                "times: give --steps or --tokens"
            )
    elif data is not None:
        rows = data.rows(training.seq_len)
    steps = training.steps or 1
    if training.tokens:
        steps = math.ceil(
            training.tokens / (training.global_batch_size * training.seq_len)
        )
    elif rows is not None and not training.steps:
        steps = math.ceil((training.epochs or 1) * rows / training.global_batch_size)
    warmup = training.warmup_steps
    if warmup is None:
        warmup = min(max(10, steps // 50), steps // 2)
    elif warmup >= steps > 1:
        raise ConfigurationError(
            f"--warmup_steps {warmup} does not fit into a run of {steps} steps: "
            "choose fewer, or a longer run"
        )
    minimum = training.min_learning_rate
    return Schedule(
        world_size=world_size,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=steps,
        warmup_steps=warmup,
        peak_learning_rate=training.learning_rate,
        min_learning_rate=training.learning_rate / 10 if minimum is None else minimum,
        rows_per_epoch=rows,
    )


def largest_micro_batch(
    global_batch_size: int,
    world_size: int,
    limit: int = LARGEST_DEFAULT_MICRO_BATCH,
) -> int:
    """Rows of the largest micro-batch up to a limit that makes up a rank's share.

    Raises:
        ConfigurationError: the batch does not divide over the ranks.
    """
    if global_batch_size % world_size:
        raise ConfigurationError(
            f"--global_batch_size {global_batch_size} does not divide over "
            f"{world_size} ranks: choose a multiple of {world_size}"
        )
    share = global_batch_size // world_size
    return next(size for size in range(min(share, limit), 0, -1) if share % size == 0)

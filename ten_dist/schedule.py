"""Arithmetic of a run, in one place: batch, length and learning rate."""

from __future__ import annotations

import dataclasses
import math

from ten_dist.config.training import TrainingConfig
from ten_dist.data import BatchShape, Manifest, Mixture, accumulation_steps
from ten_dist.errors import ConfigurationError

LARGEST_DEFAULT_MICRO_BATCH = 8
DEFAULT_DECAY_FRACTION = 0.2
_INVERSE_SQRT_WARMUP = 4000


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
    kind: str = "cosine"
    """That of `--schedule`; records of earlier releases have none, and cosines."""
    decay_fraction: float | None = None
    """Last part of the run, in which the learning rate falls; None but with wsd."""

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

    @property
    def decay_steps(self) -> int:
        """Last steps, over which the learning rate of wsd falls; 0 with the others."""
        if self.decay_fraction is None:
            return 0
        return max(1, round(self.decay_fraction * self.steps))

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, 0-based.

        Linear over the warm-up to the peak, then what `--schedule` names. A cosine, a line
        and the decay of wsd reach the minimum at the last step. That decay is one minus a
        square root, which ended below a linear one in Hägele et al. (arXiv 2405.18392);
        wsd itself is of MiniCPM (arXiv 2404.06395), and inverse_sqrt of Vaswani et al.
        (arXiv 1706.03762).
        """
        peak, least = self.peak_learning_rate, self.min_learning_rate
        if step < self.warmup_steps:
            return peak * ((step + 1) / self.warmup_steps)
        if self.kind == "constant":
            return peak
        if self.kind == "inverse_sqrt":
            return max(least, peak * math.sqrt(self.warmup_steps / (step + 1)))
        if self.kind == "wsd":
            decayed = step + 1 - (self.steps - self.decay_steps)
            if decayed <= 0:
                return peak
            left = 1 - math.sqrt(min(1.0, decayed / self.decay_steps))
            return least + (peak - least) * left
        remaining = max(1, self.steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        linear = self.kind == "linear"
        left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
        return least + (peak - least) * left

    def common_steps(self, other: Schedule) -> int:
        """Steps, from the first on, whose learning rates are the same in both."""
        steps = min(self.steps, other.steps)
        differ = (
            s for s in range(steps) if self.learning_rate(s) != other.learning_rate(s)
        )
        return next(differ, steps)

    def describe_extension(self, before: Schedule, done: int, common: int) -> str:
        """What becomes of a run that had the length of another schedule, in words.

        Args:
            before: its schedule until now.
            done: steps that it has done.
            common: steps from the first on that had the learning rates of this schedule.
        """
        verb = "shortened" if self.steps < before.steps else "extended"
        length = f"{verb} from {before.steps:,} to {self.steps:,} steps"
        if done == 0:
            return f"{length}, none of which is done"
        if done >= self.steps:
            return f"{length}, all of which are done"
        if done <= common:
            return (
                f"{length}: from step {done + 1:,} on it is exactly a run of "
                f"{self.steps:,} steps with the same warm-up, as no learning rate so far "
                "depends on the length"
            )
        return (
            f"{length}: from step {done + 1:,} on the learning rate is that of a run of "
            f"{self.steps:,} steps, {self.describe_change(before, done)}; moments and the "
            "order of the data go on"
        )

    def describe_change(self, before: Schedule, done: int) -> str:
        """Learning rates of the last step of another schedule and of the next of this."""
        old, new = before.learning_rate(done - 1), self.learning_rate(done)
        return f"{old:.3g} at step {done:,} and {new:.3g} at the next"

    def describe_learning_rate(self) -> str:
        """The learning rate in words."""
        peak, least = f"{self.peak_learning_rate:g}", f"{self.min_learning_rate:g}"
        plateau = f"{peak} up to step {self.steps - self.decay_steps:,}"
        end = f"{self.learning_rate(self.steps - 1):.3g}"
        after = {
            "cosine": f"a cosine to {least}",
            "linear": f"a line to {least}",
            "wsd": f"{plateau}, then 1 - sqrt over {self.decay_steps:,} steps to {least}",
            "constant": "constant",
            "inverse_sqrt": f"falling as 1 / sqrt(step), to {end} at the end",
        }
        return f"{self.warmup_steps} steps up to {peak}, then {after[self.kind]}"

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
            f"learning rate: {self.describe_learning_rate()}",
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
            warm-up and decay are longer than the run, or the data is a mixture and the
            run's length is to be counted in epochs of it.
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
    kind, peak = training.schedule, training.peak_of_adamw
    minimum = training.min_learning_rate
    if minimum is None:
        minimum = {"cosine": peak / 10, "constant": peak}.get(kind, 0.0)
    schedule = Schedule(
        world_size=world_size,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=steps,
        warmup_steps=_warmup_steps(training, steps),
        peak_learning_rate=peak,
        min_learning_rate=minimum,
        rows_per_epoch=rows,
        kind=kind,
        decay_fraction=(training.decay_fraction or DEFAULT_DECAY_FRACTION)
        if kind == "wsd"
        else None,
    )
    # Of a run of unknown length, one step is assumed.
    left = steps - schedule.warmup_steps
    if schedule.decay_steps > left and steps > 1:
        raise ConfigurationError(
            f"--decay_fraction {schedule.decay_fraction:g} of {steps} steps is "
            f"{schedule.decay_steps}, more than the {left} after the warm-up: choose "
            "less, fewer --warmup_steps, or a longer run"
        )
    return schedule


def _warmup_steps(training: TrainingConfig, steps: int) -> int:
    """Steps of the warm-up of a run of a length.

    By default it does not depend on the length where nothing after it does, so that an
    extended run is what a longer one would have been.
    """
    warmup, default = training.warmup_steps, ""
    if warmup is None:
        if training.schedule in ("cosine", "linear"):
            return min(max(10, steps // 50), steps // 2)
        default = f", the default with --schedule {training.schedule},"
        warmup = _INVERSE_SQRT_WARMUP
        if training.schedule != "inverse_sqrt":
            warmup = round(2 / (1 - training.adam_beta2))
    if warmup >= steps > 1:
        raise ConfigurationError(
            f"--warmup_steps {warmup}{default} does not fit into a run of {steps} steps: "
            "choose fewer, or a longer run"
        )
    return warmup


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

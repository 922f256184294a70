"""Training configuration: what a run does with a model (docs/configuration.md).

Each field is the option of the same name of `ten-dist train`; the text below a field is
its help. Model fields are in :class:`ten_dist.config.model.TemporalEigenstateConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.errors import ConfigurationError

PRECISIONS = ("fp32", "bf16", "bf16_params", "fp16")
VERIFICATIONS = ("full", "size")
ANOMALY_POLICIES = ("skip", "rollback", "stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Data, batch, schedule, files and reporting of one run.

    Every instance is consistent in itself; what depends on the data or on the number of
    ranks is checked by :func:`ten_dist.schedule.make_schedule`.
    """

    config: str = "nano"
    """Preset of the model: pico, nano, micro, small, medium, large or xlarge."""
    data: str | None = None
    """Folder of token shards to train on, as data_prep.shard writes it; or its URL, such
    as s3://BUCKET/FOLDER or https://HOST/FOLDER; or a mixture of several by weight,
    NAME=DATA:WEIGHT,NAME=DATA:WEIGHT."""
    val_data: str | None = None
    """Folder of held-out token shards, or its URL; without it DATA/val is used where it
    exists."""
    data_cache: str | None = None
    """Folder on local disk that keeps the shards of a URL, shared by all processes of a
    machine; without it shards are fetched whenever they are needed."""
    data_cache_gigabytes: float | None = None
    """Keep at most N gigabytes (1e9 bytes) in --data_cache, the least recently used
    shards going first; by default all are kept."""
    output_dir: str | None = None
    """Run folder: configuration, metrics, TensorBoard events, checkpoints."""
    deepspeed_config: str = "zero2"
    """DeepSpeed JSON file, or the name of one of ds_configs/ without its ending."""
    nvme_path: str | None = None
    """Folder on a local disk to swap to, where --deepspeed_config moves the optimizer to
    NVMe; what is swapped is deleted at the end."""
    steps: int | None = None
    """Length of the run in optimizer steps."""
    tokens: float | None = None
    """Length of the run in tokens, such as 26e9, rounded up to whole steps."""
    epochs: float | None = None
    """Length of the run in passes over the data (1 if no length is given)."""
    seq_len: int = 1024
    """Tokens of a row, T."""
    global_batch_size: int = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Rows a rank processes at once; by default the largest divisor of its share up to
    8."""
    document_masking: bool = False
    """Start anew behind every separator of the data, so that no document has any effect
    on another: in training, validation, evaluation and generation."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the cosine; by default a tenth of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default 2 % of the run, at least 10."""
    weight_decay: float = 0.1
    """Weight decay of matrices; recurrence parameters, norms and biases take none."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    gradient_clipping: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    seed: int = 0
    """Seed of initial weights, dropout and the order of rows."""
    precision: str = "bf16"
    """fp32; bf16: matrix products in bfloat16, parameters and recurrence in float32;
    bf16_params: parameters in bfloat16 as well, with float32 copies and gradients in the
    sharded optimizer (ZeRO stages 1 to 3); or fp16: as bf16 but with products in float16
    and a loss scale that adapts itself, for GPUs without bfloat16."""
    compile: bool = False
    """Compile each block with torch.compile, a minute or more at the start."""
    on_anomaly: str = "skip"
    """What to do about a step whose loss or gradient is not finite, or whose loss or
    gradient norm is a spike: skip leaves the weights as they are and goes on, up to 10
    steps in a row; rollback goes back to the newest checkpoint and leaves the batch out;
    stop ends the run. All are logged with the rows of the batch. After a spike of the
    gradient norm, skip keeps the clipped update."""
    spike_threshold: float = 8.0
    """A spike is more than this many standard deviations above the mean of the last 128
    steps; 0 looks for none."""
    eval_interval: int = 250
    """Steps between validations; the last step is always validated."""
    eval_rows: int = 512
    """Rows of the validation data to use while training, from its start; 0 takes
    all."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int | None = None
    """Delete all but the newest N checkpoints; by default all are kept."""
    keep_checkpoint_every: int | None = None
    """With --keep_checkpoints, keep those whose step is a multiple of N for good."""
    grace_seconds: float = 25.0
    """After SIGTERM, SIGINT or SIGHUP, which have all ranks save at the end of the step and stop:
    seconds until a process ends even if it could not. The deepspeed launcher kills after
    30. SIGUSR1 does the same and sets no limit."""
    resume: str = "auto"
    """auto continues the run in the output folder if there is one; never refuses to;
    PATH starts a new run from that checkpoint folder, and once the new run has a
    checkpoint of its own continues from there."""
    num_workers: int = 1
    """Processes a rank reads data with; 0 reads in the training process."""
    data_verification: str = "full"
    """full reads and hashes every shard before training, ranks sharing the work; size
    only checks names and sizes. Of a URL only sizes are checked before training, and
    each shard is hashed whenever it is fetched; `ten-dist data verify URL` hashes all."""
    dry_run: bool = False
    """Validate everything, print the plan, run --dry_samples rows, write nothing."""
    dry_samples: int = 2
    """Rows to run in a dry run."""
    hang_timeout: float = 600.0
    """End the run when a rank has made no progress for N seconds: every rank writes where
    it is and its stacks to OUTPUT_DIR/hang/, and the exit status is 4; 0 never does."""
    startup_timeout: float = 1800.0
    """The same, in seconds, while the run starts: connecting, checking data, loading,
    and its first step, validation and checkpoint."""
    straggler_interval: int = 100
    """Steps between comparisons of the ranks' times before they first wait for each
    other in a step; 0 compares none."""
    ledger: bool = False
    """Write which rows each rank consumed to OUTPUT_DIR/ledger/."""
    dollars_per_hour: float | None = None
    """Price of all machines of the run together: what it has cost, all starts of it, and
    will cost then appears in the progress bar, metrics and TensorBoard."""

    def __post_init__(self) -> None:
        lengths = [n for n in ("steps", "tokens", "epochs") if getattr(self, n)]
        if len(lengths) > 1:
            raise ConfigurationError(
                f"--{lengths[0]} and --{lengths[1]} both give the length of the run: "
                "keep one"
            )
        check_cache_options(self.data_cache, self.data_cache_gigabytes)
        for name in ("steps", "tokens", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"--{name} must be more than 0, not {value}")
        for name in (
            "seq_len",
            "global_batch_size",
            "eval_interval",
            "checkpoint_interval",
            "dry_samples",
        ):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        if self.micro_batch_size is not None:
            _require(self, "micro_batch_size", self.micro_batch_size >= 1, "1 or more")
        for name in (
            "weight_decay",
            "gradient_clipping",
            "eval_rows",
            "num_workers",
            "spike_threshold",
            "hang_timeout",
            "startup_timeout",
            "straggler_interval",
        ):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("hang_timeout", "startup_timeout", "grace_seconds"):
            most = f"{LONGEST_SECONDS:,.0f} or less"
            _require(self, name, getattr(self, name) <= LONGEST_SECONDS, most)
        _require(self, "grace_seconds", self.grace_seconds > 0, "more than 0")
        _require(self, "seed", 0 <= self.seed < 2**32, "at least 0 and below 2^32")
        for name in ("keep_checkpoints", "keep_checkpoint_every"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "1 or more")
        if self.keep_checkpoint_every and self.keep_checkpoints is None:
            raise ConfigurationError(
                "--keep_checkpoint_every has no effect without --keep_checkpoints: all "
                "are kept"
            )
        if self.warmup_steps is not None:
            _require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require(
            self, "learning_rate", 0 < self.learning_rate < math.inf, "more than 0"
        )
        if self.min_learning_rate is not None:
            _require(
                self,
                "min_learning_rate",
                0 <= self.min_learning_rate <= self.learning_rate,
                "between 0 and --learning_rate",
            )
        _require(
            self, "precision", self.precision in PRECISIONS, " or ".join(PRECISIONS)
        )
        _require(
            self,
            "on_anomaly",
            self.on_anomaly in ANOMALY_POLICIES,
            " or ".join(ANOMALY_POLICIES),
        )
        _require(
            self,
            "data_verification",
            self.data_verification in VERIFICATIONS,
            " or ".join(VERIFICATIONS),
        )
        if self.dollars_per_hour is not None:
            _require(
                self,
                "dollars_per_hour",
                0 < self.dollars_per_hour < math.inf,
                "more than 0",
            )
        if not self.dry_run:
            for name in ("data", "output_dir"):
                if getattr(self, name) is None:
                    raise ConfigurationError(f"--{name} is missing")

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all fields, ready for JSON."""
        return dataclasses.asdict(self)


def _require(config: TrainingConfig, name: str, valid: bool, wanted: str) -> None:
    if not valid:
        raise ConfigurationError(
            f"--{name} must be {wanted}, not {getattr(config, name)}"
        )


def check_cache_options(directory: str | None, gigabytes: float | None) -> None:
    """Check `--data_cache` and `--data_cache_gigabytes` against each other.

    Raises:
        ConfigurationError: the limit is not positive, or there is nothing to limit.
    """
    if gigabytes is None:
        return
    if directory is None:
        raise ConfigurationError(
            "--data_cache_gigabytes has no effect without --data_cache: give a "
            "folder there, or leave it out"
        )
    if not 0 < gigabytes < math.inf:
        raise ConfigurationError(
            f"--data_cache_gigabytes must be more than 0, not {gigabytes}"
        )

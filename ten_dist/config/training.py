"""Training configuration: what a run does with a model (docs/configuration.md).

Each field is the option of the same name of `ten-dist train`; the text below a field is
its help. Fields stand in groups: code that needs one group of them takes that class, and
a :class:`TrainingConfig` is an instance of each. Model fields are in
:class:`ten_dist.config.model.TemporalEigenstateConfig`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import (
    SECONDS,
    Options,
    at_least,
    metavar,
    more_than,
)
from ten_dist.config.step_range import StepRange
from ten_dist.errors import ConfigurationError

RUN_FORMAT = "ten_dist.run"
"""What the `config.json` of a run says that it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Which model is trained, where to, and from what."""

    GROUP: ClassVar[str] = "run"

    config: Annotated[str, metavar("PRESET")] = "nano"
    """Preset of the model: pico, nano, micro, small, medium, large or xlarge."""
    output_dir: Annotated[str | None, metavar("DIR")] = None
    """Needed, but for --dry_run: run folder with configuration, metrics, TensorBoard events, checkpoints."""
    resume: Annotated[str, metavar("auto|never|PATH")] = "auto"
    """auto continues the run in the output folder if there is one; never refuses to;
    PATH starts a new run from that checkpoint folder, and once the new run has a
    checkpoint of its own continues from there."""
    init_from: Annotated[str | None, metavar("DIR")] = None
    """Begin a new run with the weights of another: the folder of a run, for its newest
    checkpoint, of a checkpoint, or of a model that `ten-dist export` wrote. Moments, step,
    data and schedule begin anew; the model must be the same. A run that has a checkpoint
    of its own continues from that."""
    init_tokenizer_mismatch: Literal["refuse", "resize"] = "refuse"
    """What to do where --init_from is of another tokenizer than the data: refuse; or
    resize, keep the embedding of each token that both spell alike and start the others as
    in a new model. The head is the embedding, and follows."""
    extend: bool = False
    """Make the run in the output folder longer, finished or not: with more --steps,
    --tokens or --epochs it goes on from its newest checkpoint, and the learning rate of
    each further step is that of a run of the new length. With --resume PATH, the run of
    that checkpoint, from there on and in a new output folder."""
    seed: Annotated[int, at_least(0, below=2**32)] = 0
    """Seed of initial weights, dropout and the order of rows."""
    dry_run: bool = False
    """Validate everything, print the plan, run --dry_samples rows, write nothing."""
    dry_samples: Annotated[int, at_least(1)] = 2
    """Rows to run in a dry run."""

    def check_together(self) -> None:
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ConfigurationError(
                "--init_from and --resume PATH both say where to begin: keep one"
            )
        if self.init_tokenizer_mismatch != "refuse" and self.init_from is None:
            raise ConfigurationError(
                "--init_tokenizer_mismatch has no effect without --init_from: leave it out"
            )
        if self.extend and self.resume == "never":
            raise ConfigurationError(
                "--extend continues a run, and --resume never does not: keep one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions(Options):
    """Where the shards of a URL are kept on this machine."""

    GROUP: ClassVar[str] = "data"

    data_cache: Annotated[str | None, metavar("DIR")] = None
    """Folder on local disk that keeps the shards of a URL, shared by all processes of a
    machine; without it shards are fetched whenever they are needed."""
    data_cache_gigabytes: Annotated[float | None, more_than(0), metavar("N")] = None
    """Keep at most N gigabytes (1e9 bytes) in --data_cache, the least recently used
    shards going first; by default all are kept."""

    def check_together(self) -> None:
        if self.data_cache_gigabytes is not None and self.data_cache is None:
            raise ConfigurationError(
                "--data_cache_gigabytes has no effect without --data_cache: give a "
                "folder there, or leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(CacheOptions):
    """Which tokens are read, and how."""

    GROUP: ClassVar[str] = "data"

    data: Annotated[str | None, metavar("DATA")] = None
    """Needed, but for --dry_run: folder of token shards to train on, as data_prep.shard writes it; or its URL, such
    as s3://BUCKET/FOLDER or https://HOST/FOLDER; or a mixture of several by weight,
    NAME=DATA:WEIGHT,NAME=DATA:WEIGHT."""
    val_data: Annotated[str | None, metavar("DIR|URL")] = None
    """Folder of held-out token shards, or its URL; without it DATA/val is used where it
    exists."""
    document_masking: bool = False
    """Start anew behind every separator of the data, so that no document has any effect
    on another: in training, validation, evaluation and generation."""
    num_workers: Annotated[int, at_least(0)] = 1
    """Processes a rank reads data with; 0 reads in the training process."""
    data_verification: Literal["full", "size"] = "full"
    """full reads and hashes every shard before training, ranks sharing the work; size
    only checks names and sizes. Of a URL only sizes are checked before training, and
    each shard is hashed whenever it is fetched; `ten-dist data verify URL` hashes all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """Rows of a step, and the length of the run."""

    GROUP: ClassVar[str] = "batch"
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("steps", "tokens", "epochs")

    seq_len: Annotated[int, at_least(1)] = 1024
    """Tokens of a row, T."""
    global_batch_size: Annotated[int, at_least(1)] = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int | None, at_least(1)] = None
    """Rows a rank processes at once; by default the largest divisor of its share up to
    8."""
    steps: Annotated[int | None, more_than(0)] = None
    """Length of the run in optimizer steps."""
    tokens: Annotated[float | None, more_than(0)] = None
    """Length of the run in tokens, such as 26e9, rounded up to whole steps."""
    epochs: Annotated[float | None, more_than(0)] = None
    """Length of the run in passes over the data (1 if no length is given)."""


MUON_LEARNING_RATE, MUON_MOMENTUM = 8e-3, 0.95
ADAMW_LEARNING_RATE, ADAMW_LEARNING_RATE_BESIDE_MUON = 1e-3, 4e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """The optimizer and its learning rates."""

    GROUP: ClassVar[str] = "optimizer"

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: orthogonal updates with one moment for the matrices of the blocks, and AdamW
    for everything else; or adamw for all."""
    learning_rate: Annotated[float | None, more_than(0)] = None
    """Peak learning rate of AdamW, by default 0.004 beside Muon, and 0.001 for all."""
    muon_learning_rate: Annotated[float | None, more_than(0)] = None
    """Peak learning rate of Muon, by default 0.008; it follows the schedule of
    --learning_rate in proportion."""
    muon_momentum: Annotated[float | None, at_least(0, below=1)] = None
    """Muon's decay of the mean of gradients, by default 0.95."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Learning rate after the warm-up: cosine or linear falls to the minimum at the last
    step; wsd (warmup-stable-decay) stays at the peak and falls over the last steps, so
    that the length may be chosen late; constant stays; inverse_sqrt falls with the
    inverse square root of the step."""
    decay_fraction: Annotated[float | None, more_than(0, most=1)] = None
    """With --schedule wsd, the last part of the run, in which the learning rate falls; by
    default 0.2 (Hägele et al., arXiv 2405.18392)."""
    min_learning_rate: Annotated[float | None, at_least(0)] = None
    """Learning rate at the end; by default a tenth of the peak with cosine, and 0 with
    linear and wsd. With inverse_sqrt the least that it falls to, by default 0."""
    warmup_steps: Annotated[int | None, at_least(0)] = None
    """Steps of linear warm-up. By default 2 % of the run, at least 10, with cosine and
    linear. With wsd and constant, which say nothing of the length: 2 / (1 -
    --adam_beta2), 40 (Ma and Yarats, arXiv 1910.04209); with inverse_sqrt 4,000 (Vaswani
    et al., arXiv 1706.03762)."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Weight decay of matrices; recurrence parameters, norms and biases take none."""
    adam_beta1: Annotated[float, at_least(0, below=1)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, at_least(0, below=1)] = 0.95
    """AdamW's decay of the mean of squared gradients."""
    gradient_clipping: Annotated[float, at_least(0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    def check_together(self) -> None:
        least = self.min_learning_rate
        if least is not None and least > self.peak_of_adamw:
            raise ConfigurationError(
                f"--min_learning_rate must be between 0 and --learning_rate, not {least}"
            )
        for name in ("muon_learning_rate", "muon_momentum"):
            if getattr(self, name) is not None and self.optimizer != "muon":
                raise ConfigurationError(
                    f"--{name} has no effect without --optimizer muon: leave it out"
                )
        if least is not None and self.schedule == "constant":
            raise ConfigurationError(
                "--min_learning_rate has no effect with --schedule constant: leave it out"
            )
        if self.decay_fraction is not None and self.schedule != "wsd":
            raise ConfigurationError(
                "--decay_fraction has no effect without --schedule wsd: leave it out"
            )
        if self.warmup_steps == 0 and self.schedule == "inverse_sqrt":
            raise ConfigurationError(
                "--schedule inverse_sqrt falls with the root of --warmup_steps over the "
                "step: give 1 or more"
            )

    @property
    def peak_of_adamw(self) -> float:
        """Its learning rate, for everything or for what Muon leaves."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "muon":
            return ADAMW_LEARNING_RATE_BESIDE_MUON
        return ADAMW_LEARNING_RATE

    @property
    def peak_of_muon(self) -> float | None:
        """Its learning rate, where it is the optimizer."""
        return self._of_muon(self.muon_learning_rate, MUON_LEARNING_RATE)

    @property
    def momentum_of_muon(self) -> float | None:
        """Its momentum, where it is the optimizer."""
        return self._of_muon(self.muon_momentum, MUON_MOMENTUM)

    def _of_muon(self, given: float | None, default: float) -> float | None:
        if self.optimizer != "muon":
            return None
        return default if given is None else given


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions(Options):
    """How the work is divided and in which precision it is done."""

    GROUP: ClassVar[str] = "compute"

    deepspeed_config: Annotated[str, metavar("FILE")] = "zero2"
    """DeepSpeed JSON file, or the name of one of ds_configs/ without its ending."""
    nvme_path: Annotated[str | None, metavar("DIR")] = None
    """Folder on a local disk to swap to, where --deepspeed_config moves the optimizer to
    NVMe; what is swapped is deleted at the end."""
    precision: Literal["fp32", "bf16", "bf16_params", "fp16"] = "bf16"
    """fp32; bf16: matrix products in bfloat16, parameters and recurrence in float32;
    bf16_params: parameters in bfloat16 as well, with float32 copies and gradients in the
    sharded optimizer (ZeRO stages 1 to 3); or fp16: as bf16 but with products in float16
    and a loss scale that adapts itself, for GPUs without bfloat16."""
    compile: bool = False
    """Compile each block with torch.compile, a minute or more at the start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavingOptions(Options):
    """Checkpoints."""

    GROUP: ClassVar[str] = "saving"

    checkpoint_interval: Annotated[int, at_least(1)] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Annotated[int | None, at_least(1)] = None
    """Delete all but the newest N checkpoints; by default all are kept."""
    keep_checkpoint_every: Annotated[int | None, at_least(1)] = None
    """With --keep_checkpoints, keep those whose step is a multiple of N for good."""
    grace_seconds: Annotated[float, more_than(0, most=LONGEST_SECONDS)] = 25.0
    """After SIGTERM, SIGINT or SIGHUP, which have all ranks save at the end of the step and stop:
    seconds until a process ends even if it could not. The deepspeed launcher kills after
    30. SIGUSR1 does the same and sets no limit."""

    def check_together(self) -> None:
        if self.keep_checkpoint_every is not None and self.keep_checkpoints is None:
            raise ConfigurationError(
                "--keep_checkpoint_every has no effect without --keep_checkpoints: all "
                "are kept"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchingOptions(Options):
    """What is looked for and reported while the run trains."""

    GROUP: ClassVar[str] = "watching"

    eval_interval: Annotated[int, at_least(1)] = 250
    """Steps between validations; the last step is always validated."""
    eval_rows: Annotated[int, at_least(0)] = 512
    """Rows of the validation data to use while training, from its start; 0 takes
    all."""
    on_anomaly: Literal["skip", "rollback", "stop"] = "skip"
    """What to do about a step whose loss or gradient is not finite, or whose loss or
    gradient norm is a spike: skip leaves the weights as they are and goes on, up to 10
    steps in a row; rollback goes back to the newest checkpoint and leaves the batch out;
    stop ends the run. All are logged with the rows of the batch. After a spike of the
    gradient norm, skip keeps the clipped update."""
    spike_threshold: Annotated[float, at_least(0)] = 8.0
    """A spike is more than this many standard deviations above the mean of the last 128
    steps; 0 looks for none."""
    hang_timeout: Annotated[float, SECONDS] = 600.0
    """End the run when a rank has made no progress for N seconds: every rank writes where
    it is and its stacks to OUTPUT_DIR/hang/, and the exit status is 4; 0 never does."""
    startup_timeout: Annotated[float, SECONDS] = 1800.0
    """The same, in seconds, while the run starts: connecting, checking data, loading,
    and its first step, validation and checkpoint."""
    straggler_interval: Annotated[int, at_least(0)] = 100
    """Steps between comparisons of the ranks' times before they first wait for each
    other in a step; 0 compares none."""
    analysis_interval: Annotated[int, at_least(0)] = 2000
    """Steps between looks at the eigenstates, for TensorBoard: energy by layer and scale,
    histograms of memory, and pictures of eigenvalues and memory, which need matplotlib
    (`ten_dist[analysis]`); of several ranks the share of communication, too. 0 never
    looks."""
    sample_prompts: Annotated[str | None, metavar("FILE")] = None
    """Show on TensorBoard, at --analysis_interval and after the last step, how the model
    continues these prompts, JSON objects a line with a "prompt", 16 at most."""
    ledger: bool = False
    """Write which rows each rank consumed to OUTPUT_DIR/ledger/."""
    tracker: Literal["wandb", "mlflow", "trackio"] | None = None
    """Also send the figures to this tracker, from a process of its own; keys and servers
    are taken from the environment, as its package does. Needs the extra of that name."""
    tracker_project: Annotated[str | None, metavar("NAME")] = None
    """Project of the run at the tracker, MLflow's experiment; by default ten_dist."""
    profile_steps: Annotated[str | None, metavar("FIRST:LAST")] = None
    """Trace these steps, counted from 1, with torch's profiler: OUTPUT_DIR/profile/ gets a
    trace of each rank, and a table of what its steps spent their time on."""
    dollars_per_hour: Annotated[float | None, more_than(0)] = None
    """Price of all machines of the run together: what it has cost, all starts of it, and
    will cost then appears in the progress bar, metrics and TensorBoard."""
    peak_tflops: Annotated[float | None, more_than(0)] = None
    """TFLOP/s of a device in the precision of the run, of which model FLOPs utilization
    (MFU) is the share; by default that of a GPU that is known, in bf16 or fp16, and of
    others there is no MFU."""

    def check_together(self) -> None:
        if self.tracker_project is not None and self.tracker is None:
            raise ConfigurationError(
                "--tracker_project has no effect without --tracker: leave it out"
            )
        if self.tracker_project == "":
            raise ConfigurationError("--tracker_project is empty: leave it out")
        if self.profile_steps is not None:
            StepRange.parse(self.profile_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Benchmarks that are run while the run trains."""

    GROUP: ClassVar[str] = "benchmarks"

    eval_tasks: Annotated[tuple[str, ...] | None, metavar("NAME,NAME")] = None
    """Tasks of lm-evaluation-harness whose figures are wanted, groups of them, or patterns
    such as arc_*; those that have the model write text are for `ten-dist evaluate`."""
    eval_tasks_interval: Annotated[int | None, at_least(1)] = None
    """Steps between two such evaluations; the last step always has one. By default
    --eval_interval."""
    eval_tasks_path: Annotated[str | None, metavar("DIR")] = None
    """Folder with task files of your own."""
    eval_tasks_limit: Annotated[int | None, at_least(1)] = None
    """Use only the first N documents of each task; by default all."""

    def check_together(self) -> None:
        for name in ("eval_tasks_interval", "eval_tasks_path", "eval_tasks_limit"):
            if getattr(self, name) is not None and not self.eval_tasks:
                raise ConfigurationError(
                    f"--{name} has no effect without --eval_tasks: leave it out"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    RunOptions,
    DataOptions,
    BatchOptions,
    OptimizerOptions,
    ComputeOptions,
    SavingOptions,
    WatchingOptions,
    TaskOptions,
):
    """All options of one run, but for those of its model.

    Every instance is consistent in itself; what depends on the data or on the number of
    ranks is checked by :func:`ten_dist.schedule.make_schedule`.
    """

    def check_together(self) -> None:
        if not self.dry_run:
            for name in ("data", "output_dir"):
                if getattr(self, name) is None:
                    raise ConfigurationError(f"--{name} is missing")

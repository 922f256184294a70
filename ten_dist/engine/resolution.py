"""Options, preset, data and number of ranks resolved into one description of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.step_range import StepRange
from ten_dist.config.training import TrainingConfig
from ten_dist.data import Manifest, Mixture
from ten_dist.deepspeed_config import derive_deepspeed_config
from ten_dist.engine.data_sets import load_data, names_of, sets_of
from ten_dist.errors import ConfigurationError
from ten_dist.harness.tasks import Tasks
from ten_dist.planning.report import describe_model
from ten_dist.planning.sharding import (
    count,
    count_moments,
    matrices_of,
    parameters_of,
)
from ten_dist.run_record import DataRecord, Extension, Origin, RunRecord
from ten_dist.schedule import Schedule, make_schedule

_VERSIONED_PACKAGES = ("ten_dist", "torch", "deepspeed", "webdataset", "tokenizers")
# These change how a step is computed, not what it computes.
_NOT_IDENTITY = ("gradient_checkpointing", "scan_backend")


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """Everything that is known of a run before its first step."""

    training: TrainingConfig
    model_config: TemporalEigenstateConfig
    schedule: Schedule
    deepspeed_config: dict[str, Any]
    data: Manifest | Mixture | None
    """The training data; None only in a dry run."""
    validation: dict[str, Manifest]
    """Held-out sets by the source of a mixture that they belong to; of a single token
    set, or where --val_data is given, one under the name ""."""
    tasks: Tasks | None = None
    """Benchmarks of --eval_tasks, loaded where the run begins."""
    sample_prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids of --sample_prompts, read by rank 0 where the run begins."""

    @functools.cached_property
    def parameters(self) -> int:
        """Weights of the model, buffers aside."""
        return count(parameters_of(self.model_config))

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps of them."""
        return count_moments(self.model_config, self.training.optimizer)

    def manifests(self) -> list[Manifest]:
        """The token sets of the run: training data, then validation data."""
        return [*sets_of(self.data), *self.validation.values()]

    def state_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to make sense, by option name."""
        model = self.model_config.to_dict()
        # The separator is that of the data; None as in runs from before the option.
        masking = model.pop("document_separator_id") is not None or None
        return {
            **{name: model[name] for name in model if name not in _NOT_IDENTITY},
            "document_masking": masking,
            "optimizer": self.training.optimizer,
            "data": self.data.fingerprint if self.data else None,
            "seed": self.training.seed,
            "seq_len": self.schedule.seq_len,
            "global_batch_size": self.schedule.global_batch_size,
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as the same run, by option name."""
        training, schedule = self.training, self.schedule
        return {
            **self.state_identity(),
            "steps": schedule.steps,
            "schedule": schedule.kind,
            "decay_fraction": schedule.decay_fraction,
            "warmup_steps": schedule.warmup_steps,
            "learning_rate": schedule.peak_learning_rate,
            "min_learning_rate": schedule.min_learning_rate,
            "muon_learning_rate": training.peak_of_muon,
            "muon_momentum": training.momentum_of_muon,
            "weight_decay": training.weight_decay,
            "adam_beta1": training.adam_beta1,
            "adam_beta2": training.adam_beta2,
            "gradient_clipping": training.gradient_clipping,
            "precision": training.precision,
        }

    def continuing(self, before: RunRecord | None) -> ResolvedRun:
        """This run as it goes on: the default of `--warmup_steps` is that of its start.

        Else it would follow the length, which `--extend` changes, and an extended run
        would not be what a longer one with the same warm-up is.

        Args:
            before: what an earlier start has recorded, if there was one.
        """
        if before is None or self.training.warmup_steps is not None:
            return self
        warmup = before.schedule.warmup_steps
        if warmup == self.schedule.warmup_steps:
            return self
        return dataclasses.replace(
            self,
            # So that the configuration that is recorded gives this run anew.
            training=dataclasses.replace(self.training, warmup_steps=warmup),
            schedule=dataclasses.replace(self.schedule, warmup_steps=warmup),
        )

    def record(
        self, before: RunRecord | None, attempt: int, step: int, origin: Origin | None
    ) -> RunRecord:
        """The content of config.json.

        Args:
            before: what the run was until now, if there was any of it.
            attempt: which start of the run this is, from 1.
            step: steps done.
            origin: what this start begins with, where that is not what `before` says.
        """
        data = self.data
        assert data is not None
        shares = None
        if isinstance(data, Mixture):
            shares = dict(zip(data.names, data.shares))
        extensions: tuple[Extension, ...] = ()
        if before is not None:
            extensions = before.extensions
            origin = origin or before.origin
            if self.schedule.steps != before.schedule.steps:
                extensions += (Extension(step, before.schedule.steps),)
        return RunRecord(
            model=self.model_config,
            # What it asks for is done, and a run that is made anew has nothing to extend.
            training=dataclasses.replace(self.training, extend=False),
            schedule=self.schedule,
            deepspeed=self.deepspeed_config,
            data=DataRecord(
                train=_places(dict(zip(names_of(data), sets_of(data)))),
                validation=_places(self.validation),
                shares=shares,
                fingerprint=data.fingerprint,
                tokenizer_sha256=data.tokenizer_sha256,
                separator_id=data.separator_id,
            ),
            identity=self.identity(),
            versions=versions(),
            attempts=attempt,
            origin=origin,
            extensions=extensions,
        )

    def describe(self) -> list[str]:
        """The run in words, one line a fact."""
        return [
            describe_model(self.training.config, self.model_config),
            *self._describe_data(),
            *self.schedule.describe(),
            *self._describe_muon(),
            f"deepspeed: {json.dumps(self.deepspeed_config)}",
        ]

    def _describe_muon(self) -> list[str]:
        peak = self.training.peak_of_muon
        if peak is None:
            return []
        matrices = matrices_of(self.model_config)
        elements = sum(matrix.elements for matrix in matrices)
        return [
            (
                f"optimizer: Muon for {len(matrices)} matrices, {elements:,} parameters, "
                f"up to a learning rate of {peak:g}; AdamW for all others"
            )
        ]

    def _describe_data(self) -> list[str]:
        training, schedule = self.training, self.schedule
        if self.data is None:
            return ["data: none given, random tokens (a dry run can do without)"]
        lines = [f"data: {training.data}, {self.data.tokens:,} tokens"]
        if training.document_masking:
            lines.append(
                "documents: kept apart, the model starts anew behind each separator, id "
                f"{self.data.separator_id}"
            )
        if self.data.masked:
            lines.append(
                "loss mask: the loss is the mean over the tokens of a step that count"
            )
        if isinstance(self.data, Mixture):
            rows = self.data.rows(schedule.seq_len)
            read = self.data.rows_before(schedule.steps * schedule.global_batch_size)
            lines += [
                f"  {name}: {share:.2%} of the rows, {count / epoch:.2f} epochs of "
                f"{epoch:,} rows"
                for name, share, count, epoch in zip(
                    self.data.names, self.data.shares, read, rows
                )
            ]
        if training.data_cache is not None:
            gigabytes = training.data_cache_gigabytes
            limit = "no limit" if gigabytes is None else f"{gigabytes:g} GB at most"
            lines.append(f"data cache: {training.data_cache}, {limit}")
        if not self.validation:
            lines.append(
                "validation: none, no --val_data given and no val folder in --data"
            )
        for name, held_out in self.validation.items():
            of_source = f" of {name}" if name else ""
            lines.append(
                f"validation{of_source}: {held_out.directory}, {held_out.tokens:,} tokens"
            )
        return lines


def _places(sets: dict[str, Manifest]) -> dict[str, str]:
    """Where token sets lie, by the names of their sources."""
    return {name: str(found.directory.resolve()) for name, found in sets.items()}


def resolve(
    training: TrainingConfig,
    model_options: dict[str, Any],
    deepspeed_file: dict[str, Any],
    world_size: int,
) -> ResolvedRun:
    """Resolve a run; reads manifests, and nothing larger.

    Args:
        training: options of the run.
        model_options: model fields that replace those of the preset.
        deepspeed_file: content of the DeepSpeed JSON file.
        world_size: number of ranks.

    Raises:
        ConfigurationError: the parts do not fit together, or the data cannot be used.
    """
    data, validation = load_data(training)
    schedule = make_schedule(training, world_size, data)
    if training.profile_steps is not None:
        StepRange.parse(training.profile_steps).check_within(schedule.steps)
    model_config = _resolve_model(training, model_options, data)
    if training.compile:
        _check_compilable(model_config)
    return ResolvedRun(
        training=training,
        model_config=model_config,
        schedule=schedule,
        deepspeed_config=derive_deepspeed_config(deepspeed_file, training, schedule),
        data=data,
        validation=validation,
    )


def _resolve_model(
    training: TrainingConfig,
    model_options: dict[str, Any],
    data: Manifest | Mixture | None,
) -> TemporalEigenstateConfig:
    """The preset with its options, and the vocabulary and separator of the data."""
    options = dict(model_options)
    if training.document_masking:
        if data is None:
            raise ConfigurationError(
                "--document_masking needs the separator of the data: give --data, or "
                "leave it out"
            )
        options["document_separator_id"] = data.separator_id
    if data is not None:
        options.setdefault("vocab_size", data.vocab_size)
        if options["vocab_size"] < data.vocab_size:
            raise ConfigurationError(
                f"--vocab_size {options['vocab_size']} is smaller than the vocabulary "
                f"of --data {training.data}, {data.vocab_size}: leave it out, or "
                "make it larger"
            )
    return TemporalEigenstateConfig.preset(training.config, **options)


def _check_compilable(config: TemporalEigenstateConfig) -> None:
    """Refuse `--compile` where torch.compile could not do it.

    Scans in plain torch have a loop over time, which a graph would hold step by step.
    """
    if config.scan_backend in ("blocked", "reference"):
        raise ConfigurationError(
            f"--compile does not go with --scan_backend {config.scan_backend}, a loop "
            "over time: leave one of them out"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigurationError(
            f"--compile needs a C++ compiler, and {compiler} is not on PATH: install "
            "it, or name another one in CXX"
        )


def versions() -> dict[str, str]:
    """What decides a run's numbers besides its options: device, Python and packages."""
    found = {"device": _device_name(), "python": platform.python_version()}
    for name in _VERSIONED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _device_name() -> str:
    """The model of this machine's GPUs, or of its processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()

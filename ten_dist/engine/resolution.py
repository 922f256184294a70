"""Options, preset, data and number of ranks resolved into one description of a run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from ten_dist.config import TemporalEigenstateConfig
from ten_dist.data import Manifest, RemoteAccess, ShardCache, held_out_set, is_url
from ten_dist.engine.deepspeed_config import derive_deepspeed_config
from ten_dist.engine.plan import Plan, make_plan
from ten_dist.errors import ConfigurationError
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.training_config import TrainingConfig

_VERSIONED_PACKAGES = ("ten_dist", "torch", "deepspeed", "webdataset", "tokenizers")
# These change how a step is computed, not what it computes.
_NOT_IDENTITY = ("gradient_checkpointing", "scan_backend")


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """Everything that is known of a run before its first step."""

    training: TrainingConfig
    model_config: TemporalEigenstateConfig
    plan: Plan
    deepspeed_config: dict[str, Any]
    manifest: Manifest | None
    """The training data; None only in a dry run."""
    val_manifest: Manifest | None

    def manifests(self) -> list[Manifest]:
        """The token sets of the run: training data, then validation data."""
        return [m for m in (self.manifest, self.val_manifest) if m is not None]

    def state_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to make sense, by option name."""
        model = self.model_config.to_dict()
        return {
            **{name: model[name] for name in model if name not in _NOT_IDENTITY},
            "data": self.manifest.fingerprint if self.manifest else None,
            "seed": self.training.seed,
            "seq_len": self.plan.seq_len,
            "global_batch_size": self.plan.global_batch_size,
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as the same run, by option name."""
        training, plan = self.training, self.plan
        return {
            **self.state_identity(),
            "steps": plan.steps,
            "warmup_steps": plan.warmup_steps,
            "learning_rate": plan.peak_learning_rate,
            "min_learning_rate": plan.min_learning_rate,
            "weight_decay": training.weight_decay,
            "adam_beta1": training.adam_beta1,
            "adam_beta2": training.adam_beta2,
            "gradient_clipping": training.gradient_clipping,
            "precision": training.precision,
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, but for the count of starts."""
        data, val_data = self.manifest, self.val_manifest
        assert data is not None
        return {
            "format": "ten_dist.run",
            "version": 1,
            "model": self.model_config.to_dict(),
            "training": self.training.to_dict(),
            "plan": dataclasses.asdict(self.plan),
            "deepspeed": self.deepspeed_config,
            "data": {
                "train": str(data.directory.resolve()),
                "validation": str(val_data.directory.resolve()) if val_data else None,
                "fingerprint": data.fingerprint,
                "tokenizer_sha256": data.tokenizer_sha256,
                "separator_id": data.separator_id,
            },
            "identity": self.identity(),
            "versions": versions(),
        }

    def describe(self) -> list[str]:
        """The run in words, one line a fact."""
        config = self.model_config
        with torch.device("meta"):
            parameters = TemporalEigenstateNetwork(config).num_parameters()
        kind = "transformer" if config.mixer == "attention" else "TEN"
        if config.hten_scales is not None:
            kind = f"HTEN {','.join(map(str, config.hten_scales))}"
        lines = [
            (
                f"model: {self.training.config}, {kind}, {parameters:,} parameters, width "
                f"{config.dim}, {config.n_layers} layers, {config.num_eigenstates} "
                f"eigenstates, vocabulary {config.vocab_size}, energy weight "
                f"{config.energy_reg_weight}"
            )
        ]
        if self.manifest is None:
            lines.append("data: none given, random tokens (a dry run can do without)")
        else:
            lines.append(f"data: {self.training.data}, {self.manifest.tokens:,} tokens")
            if self.training.data_cache is not None:
                gigabytes = self.training.data_cache_gigabytes
                limit = "no limit" if gigabytes is None else f"{gigabytes:g} GB at most"
                lines.append(f"data cache: {self.training.data_cache}, {limit}")
            lines.append(
                "validation: none, no --val_data given and no val folder in --data"
                if self.val_manifest is None
                else f"validation: {self.val_manifest.directory}, "
                f"{self.val_manifest.tokens:,} tokens"
            )
        lines += self.plan.describe()
        lines.append(f"deepspeed: {json.dumps(self.deepspeed_config)}")
        return lines


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
    manifest, val_manifest = _load_manifests(training)
    plan = make_plan(training, world_size, manifest)
    model_config = _resolve_model(training, model_options, manifest)
    if training.compile:
        _check_compilable(model_config)
    return ResolvedRun(
        training=training,
        model_config=model_config,
        plan=plan,
        deepspeed_config=derive_deepspeed_config(deepspeed_file, training, plan),
        manifest=manifest,
        val_manifest=val_manifest,
    )


def _load_manifests(
    training: TrainingConfig,
) -> tuple[Manifest | None, Manifest | None]:
    if training.data is None:
        return None, None
    cache = _shard_cache(training)
    # A dry run writes nothing, this folder included.
    access = RemoteAccess(cache=None if training.dry_run else cache)
    manifest = Manifest.load(training.data, access)
    val_folder = training.val_data
    if val_folder is None:
        val_folder = held_out_set(manifest.directory)
    val_manifest = None if val_folder is None else Manifest.load(val_folder, access)
    if cache is not None:
        remote = [m for m in (manifest, val_manifest) if m and is_url(m.directory)]
        cache.check(max(shard.bytes for m in remote for shard in m.shards))
    if val_manifest is None:
        return manifest, None
    if val_manifest.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise ConfigurationError(
            f"--val_data {val_folder} was made with another tokenizer than --data "
            f"{training.data}: prepare it with --tokenizer {manifest.tokenizer_path}"
        )
    val_manifest.rows(training.seq_len)
    return manifest, val_manifest


def _shard_cache(training: TrainingConfig) -> ShardCache | None:
    """What `--data_cache` describes, unless there is nothing that it would keep."""
    if training.data_cache is None:
        return None
    if not any(is_url(data) for data in (training.data, training.val_data) if data):
        raise ConfigurationError(
            "--data_cache has no effect with local --data: leave it out"
        )
    gigabytes = training.data_cache_gigabytes
    limit = None if gigabytes is None else int(gigabytes * 1e9)
    return ShardCache(Path(training.data_cache).absolute(), limit)


def _resolve_model(
    training: TrainingConfig, model_options: dict[str, Any], manifest: Manifest | None
) -> TemporalEigenstateConfig:
    """The preset with its options, and the vocabulary of the data."""
    options = dict(model_options)
    if manifest is not None:
        options.setdefault("vocab_size", manifest.vocab_size)
        if options["vocab_size"] < manifest.vocab_size:
            raise ConfigurationError(
                f"--vocab_size {options['vocab_size']} is smaller than the vocabulary "
                f"of --data {training.data}, {manifest.vocab_size}: leave it out, or "
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
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found

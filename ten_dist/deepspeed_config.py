"""The DeepSpeed configuration of a run: its JSON file and what the options add.

A setting has one home. The file holds ZeRO and communication settings; batch, precision,
clipping, optimizer and schedule are options of `ten-dist train`, from which the rest is
derived here, once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ten_dist.config.training import ComputeOptions, TrainingConfig
from ten_dist.errors import ConfigurationError
from ten_dist.files import exists, read_user_text
from ten_dist.schedule import Schedule

SHIPPED_CONFIGS = Path(__file__).with_name("ds_configs")

_OPTION_OF_KEY = {
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--global_batch_size and --micro_batch_size",
    "gradient_clipping": "--gradient_clipping",
    "optimizer": "--optimizer, --learning_rate, --weight_decay and those of each",
    "scheduler": "--schedule, --learning_rate, --min_learning_rate and --warmup_steps",
    "fp16": "--precision",
    "bf16": "--precision",
    "torch_autocast": "--precision",
    "activation_checkpointing": "--gradient_checkpointing",
}
_REMOVED_KEYS = (
    "elasticity",
    "nebula",
    "compression_training",
    "quantize_training",
    "eigenvalue",
    "amp",
    "sparse_gradients",
    "sparse_attention",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    # Of zero_optimization.
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "zeropp_loco_param",
)

# What may be moved off the device, and the least ZeRO stage that does.
_OFFLOAD_STAGES = {"offload_optimizer": 1, "offload_param": 3}


def load_deepspeed_file(name: str) -> dict[str, Any]:
    """Read `--deepspeed_config`: a path, or the name of a file in ds_configs/.

    Raises:
        ConfigurationError: no such file, not JSON, a key that an option owns, one that
            DeepSpeed does not have, a value that it does not take, or offload that it
            cannot do.
    """
    path = Path(name)
    if not exists(path) and path.parent == Path("."):
        path = SHIPPED_CONFIGS / (name if name.endswith(".json") else f"{name}.json")
    if not exists(path) or path.is_dir():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json")))
        raise ConfigurationError(
            f"--deepspeed_config {name} is neither a file nor one of {shipped}"
        )
    config = _read_json(path)
    fault = next(_faults(config, path), None)
    if fault is not None:
        raise ConfigurationError(fault)
    return config


def _read_json(path: Path) -> Any:
    """The content of a JSON file, in which no key of an object comes twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                raise ValueError(f"the key '{key}' comes twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    text = read_user_text(path, f"--deepspeed_config {path}")
    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"--deepspeed_config {path} is not valid JSON: {error}"
        ) from None


def _faults(config: Any, path: Path) -> Iterator[str]:
    """What is wrong with the content of a file; each check relies on those before it."""
    if not isinstance(config, dict):
        yield f"--deepspeed_config {path} is not a JSON object"
    for key, option in _OPTION_OF_KEY.items():
        if key in config:
            yield f"remove '{key}' from {path}: it is set by {option}"
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"zero_optimization in {path} is not a JSON object"
    for key in _REMOVED_KEYS:
        if key in config or key in zero:
            yield f"remove '{key}' from {path}: DeepSpeed no longer has it"
    left_open = ", ".join(_left_open(config))
    if left_open:
        yield (
            f'{left_open} in {path}: "auto" is for Hugging Face\'s Trainer, '
            "which fills it in: give a value, or leave the key out"
        )
    stage = zero_stage(config)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage in {path} must be 0, 1, 2 or 3"
    if zero.get("round_robin_gradients"):
        # stage_1_and_2.py, _link_all_hp_params: it links them in the order of the groups.
        yield (
            f"remove 'round_robin_gradients' from {path}: with it DeepSpeed says wrongly "
            "where the elements of a parameter are, and checkpoints would be wrong"
        )
    if path.parent != SHIPPED_CONFIGS:
        # The commands that need no DeepSpeed do not wait for it with what is shipped.
        from ten_dist.deepspeed_check import check_values

        check_values(config, path)
    yield from _offload_faults(config, stage, path)


def _left_open(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys whose value is "auto", those of sections with a dot."""
    for key, value in section.items():
        if value == "auto":
            yield prefix + key
        elif isinstance(value, dict):
            yield from _left_open(value, f"{prefix}{key}.")


def _offload_faults(config: dict[str, Any], stage: int, path: Path) -> Iterator[str]:
    """Offload that DeepSpeed cannot do, fails with, or would silently not do."""
    for part, least in _OFFLOAD_STAGES.items():
        device = _offload(config, part).get("device", "none")
        key = f"{part}.device in {path}"
        if "nvme_path" in _offload(config, part):
            yield f"remove '{part}.nvme_path' from {path}: it is set by --nvme_path"
        if device == "nvme" and stage != 3:
            yield (
                f"{key} is nvme, which needs ZeRO stage 3: at stage {stage} DeepSpeed "
                "moves nothing to NVMe; choose stage 3, or cpu"
            )
        if device != "none" and stage < least:
            yield (
                f"{key} is {device}, which needs ZeRO stage {least} or more: at stage "
                f"{stage} DeepSpeed moves nothing"
            )
    if _offload(config, "offload_param").get("device") == "nvme":
        # partitioned_param_coordinator.py, __prefetch_nvme_param_partitions.
        yield (
            f"offload_param.device in {path} is nvme, with which DeepSpeed fails: it "
            "reads a parameter ahead twice that is used twice soon, as at the turn from "
            "forward to backward; choose cpu, which also goes with the optimizer on nvme"
        )
    if not swaps_to_nvme(config):
        return
    optimizer = _offload(config, "offload_optimizer")
    ahead = sum(bool(optimizer.get(f"pipeline_{way}")) for way in ("read", "write"))
    needed = 4 * (1 + ahead)
    if int(optimizer.get("buffer_count", 4)) < needed:
        yield (
            f"offload_optimizer.buffer_count in {path} must be {needed} or more: weight, "
            "gradient and two moments of a sub-group are in memory at one time, and of "
            "another one for each of pipeline_read and pipeline_write"
        )
    if float(optimizer.get("ratio", 1.0)) != 1.0:
        yield (
            f"offload_optimizer.ratio in {path} must be 1 where the device is nvme: "
            "what is swapped is updated on the CPU"
        )


def _offload(config: dict[str, Any], part: str) -> dict[str, Any]:
    """The section of what is moved off the device, empty where nothing is."""
    return config.get("zero_optimization", {}).get(part) or {}


def swaps_to_nvme(config: dict[str, Any]) -> bool:
    """Whether the optimizer's weights and moments lie on NVMe."""
    return _offload(config, "offload_optimizer").get("device") == "nvme"


def check_nvme_path(file_config: dict[str, Any], options: ComputeOptions) -> None:
    """Compare `--nvme_path` with the DeepSpeed file.

    Raises:
        ConfigurationError: it is missing, or has no effect.
    """
    name = options.deepspeed_config
    if swaps_to_nvme(file_config) and options.nvme_path is None:
        raise ConfigurationError(
            "--nvme_path is missing: offload_optimizer.device of --deepspeed_config "
            f"{name} is nvme; give a folder on the disk to swap to"
        )
    if options.nvme_path is not None and not swaps_to_nvme(file_config):
        raise ConfigurationError(
            f"--nvme_path has no effect with --deepspeed_config {name}, which moves "
            "nothing to NVMe: leave it out, or choose nvme"
        )


def check_optimizer(file_config: dict[str, Any], training: TrainingConfig) -> None:
    """Refuse `--optimizer muon` where DeepSpeed would not leave the update to it.

    Raises:
        ConfigurationError: the optimizer is on NVMe, or partly or wholly replaced.
    """
    if training.optimizer != "muon":
        return
    moved = _offload(file_config, "offload_optimizer")
    faults = {
        "offload_optimizer.device nvme": moved.get("device") == "nvme",
        "offload_optimizer.ratio": float(moved.get("ratio", 1.0)) != 1.0,
        "offload_optimizer.super_offload": bool(moved.get("super_offload")),
        "zenflow": bool(file_config.get("zero_optimization", {}).get("zenflow")),
    }
    for key, present in faults.items():
        if present:
            raise ConfigurationError(
                f"--optimizer muon does not go with {key} of --deepspeed_config "
                f"{training.deepspeed_config}, which has DeepSpeed's own AdamW or a disk "
                "in the middle of an update: choose another file, such as offload, or "
                "--optimizer adamw"
            )


def with_nvme_path(config: dict[str, Any], path: str | None) -> dict[str, Any]:
    """A configuration that swaps to NVMe, with the folder to swap to."""
    zero = config["zero_optimization"]
    optimizer = {**zero["offload_optimizer"], "nvme_path": path}
    return {**config, "zero_optimization": {**zero, "offload_optimizer": optimizer}}


def zero_stage(config: dict[str, Any]) -> Any:
    """ZeRO stage of a DeepSpeed configuration."""
    return config.get("zero_optimization", {}).get("stage", 0)


def offloads(config: dict[str, Any], part: str) -> bool:
    """Whether `part`, offload_optimizer or offload_param, does not live on the device."""
    return _offload(config, part).get("device", "none") != "none"


def check_precision(precision: str, file_config: dict[str, Any], name: str) -> None:
    """Refuse a `--precision` that cannot be had with `--deepspeed_config` `name`.

    Raises:
        ConfigurationError: parameters in bfloat16 at stage 0.
    """
    if precision == "bf16_params" and zero_stage(file_config) == 0:
        raise ConfigurationError(
            "--precision bf16_params needs ZeRO stage 1, 2 or 3, which keep float32 "
            f"copies of the parameters; --deepspeed_config {name} is of stage 0: choose "
            "zero1, or --precision bf16"
        )


def derive_deepspeed_config(
    file_config: dict[str, Any], training: TrainingConfig, schedule: Schedule
) -> dict[str, Any]:
    """The complete configuration that DeepSpeed is given, ready for JSON.

    Raises:
        ConfigurationError: the precision cannot be had at this ZeRO stage.
    """
    derived = {
        # The optimizer is torch's where no fused one fits, also with offload.
        "zero_force_ds_cpu_optimizer": False,
        **file_config,
        "train_batch_size": schedule.global_batch_size,
        "train_micro_batch_size_per_gpu": schedule.micro_batch_size,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        # Always explicit: DeepSpeed's own default is 1.0, not off.
        "gradient_clipping": training.gradient_clipping,
    }
    if swaps_to_nvme(file_config):
        derived = with_nvme_path(derived, training.nvme_path)
    if training.optimizer == "muon":
        # Ours is none of those that DeepSpeed knows.
        derived["zero_allow_untested_optimizer"] = True
    if training.precision == "bf16":
        # Not DeepSpeed's `bf16`: that casts every parameter, those of the recurrence
        # included, and at stage 0 its first step is wrong.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif training.precision == "bf16_params":
        check_precision(training.precision, file_config, training.deepspeed_config)
        derived["bf16"] = {"enabled": True}
        # DeepSpeed would add up the gradients of a step in bfloat16.
        derived["data_types"] = {
            **file_config.get("data_types", {}),
            "grad_accum_dtype": "fp32",
        }
    # Nothing for fp16: DeepSpeed sees float32, see ten_dist.engine.loss_scale.
    return derived

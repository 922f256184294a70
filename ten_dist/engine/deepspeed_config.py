"""The DeepSpeed configuration of a run: its JSON file and what the options add.

A setting has one home. The file holds ZeRO and communication settings; batch, precision,
clipping, optimizer and schedule are options of `ten-dist train`, from which the rest is
derived here, once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ten_dist.engine.plan import Plan
from ten_dist.errors import ConfigurationError
from ten_dist.training_config import TrainingConfig

SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

_OPTION_OF_KEY = {
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--global_batch_size and --micro_batch_size",
    "gradient_clipping": "--gradient_clipping",
    "optimizer": "--learning_rate, --weight_decay, --adam_beta1 and --adam_beta2",
    "scheduler": "--learning_rate, --min_learning_rate and --warmup_steps",
    "fp16": "--precision",
    "bf16": "--precision",
    "torch_autocast": "--precision",
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
)
_REMOVED_ZERO_KEYS = (
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "zeropp_loco_param",
)


def load_deepspeed_file(name: str) -> dict[str, Any]:
    """Read `--deepspeed_config`: a path, or the name of a file in ds_configs/.

    Raises:
        ConfigurationError: no such file, not JSON, a key that an option owns, or one
            that DeepSpeed no longer has.
    """
    path = Path(name)
    if not path.is_file() and path.parent == Path("."):
        path = SHIPPED_CONFIGS / (name if name.endswith(".json") else f"{name}.json")
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json")))
        raise ConfigurationError(
            f"--deepspeed_config {name} is neither a file nor one of {shipped}"
        )
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(
            f"--deepspeed_config {path} cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigurationError(
            f"--deepspeed_config {path} is not valid JSON: {error}"
        ) from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"--deepspeed_config {path} is not a JSON object")
    for key, option in _OPTION_OF_KEY.items():
        if key in config:
            raise ConfigurationError(
                f"remove '{key}' from {path}: it is set by {option}"
            )
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigurationError(f"zero_optimization in {path} is not a JSON object")
    removed = [key for key in _REMOVED_KEYS if key in config]
    removed += [key for key in _REMOVED_ZERO_KEYS if key in zero]
    if removed:
        raise ConfigurationError(
            f"remove '{removed[0]}' from {path}: DeepSpeed no longer has it"
        )
    if zero_stage(config) not in (0, 1, 2, 3):
        raise ConfigurationError(
            f"zero_optimization.stage in {path} must be 0, 1, 2 or 3"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise ConfigurationError(
                f"{part}.device in {path} is nvme, from where no checkpoint is written: "
                "choose cpu"
            )
    return config


def zero_stage(config: dict[str, Any]) -> Any:
    """ZeRO stage of a DeepSpeed configuration."""
    return config.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in host memory."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


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
    file_config: dict[str, Any], training: TrainingConfig, plan: Plan
) -> dict[str, Any]:
    """The complete configuration that DeepSpeed is given, ready for JSON.

    Raises:
        ConfigurationError: the precision cannot be had at this ZeRO stage.
    """
    derived = {
        # The optimizer is torch's where no fused one fits, also with offload.
        "zero_force_ds_cpu_optimizer": False,
        **file_config,
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        # Always explicit: DeepSpeed's own default is 1.0, not off.
        "gradient_clipping": training.gradient_clipping,
    }
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

"""Whether DeepSpeed takes the values of a DeepSpeed file, found before a run begins.

DeepSpeed checks most of them when it is started, each in its own way and with an error of
its own; some it never checks, and fails in the middle of a step.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from deepspeed.runtime import constants
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from pydantic import ValidationError

from ten_dist.errors import ConfigurationError

# What DeepSpeed needs before it looks at anything else.
_BATCH = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
_DATA_TYPES = ("fp32", "fp16", "bf16", None)
_DTYPE_KEYS = ("grad_accum_dtype", "param_dtype", "buffer_dtype")


class _AskedFor(dict):
    """A dictionary that knows which of its keys were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __copy__(self) -> _AskedFor:
        # DeepSpeed works with a copy.
        return self


def check_values(config: dict[str, Any], path: Path) -> None:
    """Have DeepSpeed read each key, one after another, and tell of the first wrong one.

    Args:
        config: content of a DeepSpeed file, without the keys that options own.
        path: of the file, for the message.

    Raises:
        ConfigurationError: DeepSpeed does not know a key, or not its value.
    """
    defaults = _scalar_defaults()
    for key, value in config.items():
        if key.startswith("_"):
            continue  # By custom a remark.
        if key in defaults:
            _check_like(value, defaults[key], f"{key} in {path}")
        read = _AskedFor({**_BATCH, key: value})
        try:
            DeepSpeedConfig(read)
        except Exception as error:  # noqa: BLE001 - DeepSpeed raises of every kind
            raise ConfigurationError(_fault(error, key, value, path)) from None
        if key not in read.asked:
            near = difflib.get_close_matches(key, read.asked, 1)
            meant = f", did you mean '{near[0]}'?" if near else ": remove it"
            raise ConfigurationError(f"DeepSpeed knows no '{key}' in {path}{meant}")
    for key, value in (config.get("aio") or {}).items():
        if key not in AIO_DEFAULT_DICT:
            raise ConfigurationError(f"DeepSpeed knows no 'aio.{key}' in {path}")
        _check_like(value, AIO_DEFAULT_DICT[key], f"aio.{key} in {path}")
    for key in _DTYPE_KEYS:
        if (config.get("data_types") or {}).get(key) not in _DATA_TYPES:
            raise ConfigurationError(
                f"data_types.{key} in {path} must be fp32, fp16 or bf16"
            )


def _scalar_defaults() -> dict[str, Any]:
    """DeepSpeed's defaults of keys that are one number or true or false, by key."""
    found: dict[str, Any] = {}
    for name, default in vars(constants).items():
        key = getattr(constants, name.removesuffix("_DEFAULT"), None)
        one_value = isinstance(default, bool | int | float)
        if name.endswith("_DEFAULT") and isinstance(key, str) and one_value:
            found[key] = default
    return {**found, "steps_per_print": 10}


def _check_like(value: Any, default: Any, what: str) -> None:
    """Refuse a value that is not of the type of the default, or no number above 0."""
    whole = "whole " if isinstance(default, int) else ""
    wanted = f"a {whole}number of more than 0"
    fits = isinstance(value, int | float) and 0 < value < 2**63
    if isinstance(default, bool):
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(value, bool) or (fits and whole and value != int(value)):
        fits = False
    if not fits:
        raise ConfigurationError(f"{what} must be {wanted}, not {value!r}")


def _fault(error: Exception, key: str, value: Any, path: Path) -> str:
    """What is wrong with a key, from the error with which DeepSpeed ended."""
    if not isinstance(error, ValidationError):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"{key} in {path} cannot be {value!r:.100}: DeepSpeed says {reason}"
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    # Some models are of several sections, which then stand in the place.
    name = ".".join(place if place[:1] == [key] else [key, *place])
    if fault["type"] == "extra_forbidden":
        return f"DeepSpeed knows no '{name}' in {path}: remove it"
    reason = fault["msg"][:1].lower() + fault["msg"][1:]
    return f"{name} in {path} cannot be {fault['input']!r:.100}: {reason}"

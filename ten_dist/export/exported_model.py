"""Reading an exported model back, as :mod:`ten_dist.checkpoint.reading` reads a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ten_dist.checkpoint import WEIGHT
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.data.tokenizer import (
    TOKENIZER_NAME,
    TextTokenizer,
    read_tokenizer_file,
)
from ten_dist.errors import ConfigurationError
from ten_dist.export.huggingface import INDEX_NAME, WEIGHTS_NAME, exported_name
from ten_dist.run_record import with_earlier_ways
from ten_dist.trained_model import TrainedModel

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}
"""What a model computes in, by the type of its weights; others in fp32."""


def read_exported_config(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of an exported model; None where the folder is none."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get("model_type") == "ten"
    return content if ours else None


def weight_files(folder: Path) -> list[Path]:
    """The files of an exported model's weights: those of its index, where there is one.

    Raises:
        OSError, ValueError: the index cannot be read.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return [folder / WEIGHTS_NAME]
    content = json.loads(index.read_text(encoding="utf-8"))
    try:
        return [folder / name for name in sorted(set(content["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX_NAME} has no weight_map of names to files") from None


class ExportedReader(contextlib.ExitStack):
    """Tensors of an exported model by the names of checkpoints, as a context.

    Args:
        folder: of the model.

    Raises:
        ConfigurationError: it is no such model, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._last: tuple[str, Tensor] | None = None
        try:
            for path in weight_files(folder):
                file = self.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigurationError(
                f"{folder} cannot be read on every node: {error}"
            ) from None

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole weight, float32."""
        if self._last is None or self._last[0] != name:
            key = exported_name(name)
            self._last = (name, self._files[key].get_tensor(key).float())
        return self._last[1]

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Set all parameters and buffers of `model`.

        Raises:
            ConfigurationError: it is of a model of another shape.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(self.tensor(WEIGHT, name))

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a weight in row-major order, float32."""
        return self.tensor(kind, name).flatten()[start:stop]

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a model that lacks tensors of these shapes.

        Raises:
            ConfigurationError: it is one.
        """
        for name, shape in shapes.items():
            key = exported_name(name)
            if key not in self._files:
                raise ConfigurationError(f"{self._folder} lacks {key}")
            found = list(self._files[key].get_slice(key).get_shape())
            if found != list(shape):
                raise ConfigurationError(
                    f"{self._folder} is of another model: {name} is {found}, "
                    f"not {list(shape)}"
                )


def load_exported(folder: Path) -> tuple[TrainedModel, TextTokenizer]:
    """The model and the tokenizer of a folder that `ten-dist export` wrote.

    Raises:
        ConfigurationError: it is no such folder, or damaged.
    """
    content = read_exported_config(folder)
    if content is None:
        raise ConfigurationError(
            f"{folder} is neither the folder of a run nor of an exported model"
        )
    known = {field.name for field in dataclasses.fields(TemporalEigenstateConfig)}
    own = {name: value for name, value in content.items() if name in known}
    config = TemporalEigenstateConfig.from_dict(
        with_earlier_ways(TemporalEigenstateConfig, own)
    )
    precision = _PRECISIONS.get(str(content.get("dtype")), "fp32")
    with ExportedReader(folder) as reader:
        model = TrainedModel.read(reader, folder, config, precision)
    tokenizer = exported_tokenizer(folder, content)
    if tokenizer is None:
        raise ConfigurationError(f"{folder} has no {TOKENIZER_NAME}")
    return model, tokenizer


def exported_tokenizer(
    folder: Path, content: Mapping[str, Any]
) -> TextTokenizer | None:
    """The tokenizer of an exported model; None where there is none.

    Args:
        folder: of the model.
        content: of its `config.json`.
    """
    path, separator_id = folder / TOKENIZER_NAME, content.get("eos_token_id")
    if not path.is_file() or not isinstance(separator_id, int):
        return None
    text = read_tokenizer_file(path, f"{folder}: {path.name}")
    return TextTokenizer.with_separator_id(text, separator_id)

"""Reading an exported model back, as :mod:`ten_dist.checkpoint.reading` reads a checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ten_dist.errors import ConfigurationError
from ten_dist.export.huggingface import INDEX_NAME, WEIGHTS_NAME, exported_name


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

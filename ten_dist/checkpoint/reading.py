"""Reading the tensors of a checkpoint, whole or in part."""

from __future__ import annotations

import bisect
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ten_dist.checkpoint.layout import (
    INDEX_NAME,
    TensorSlice,
    tensor_file_name,
)
from ten_dist.checkpoint.record import CheckpointRecord, read_record
from ten_dist.errors import ConfigurationError

if TYPE_CHECKING:
    # Python 3.10 has none.
    from typing import Self


class CheckpointReader:
    """Tensors of one checkpoint. Only what is asked for is read.

    Attributes:
        path: folder of the checkpoint.
        record: what it says of itself, see :mod:`ten_dist.checkpoint.record`.
        shapes: shape of every tensor by its name: parameters, then buffers. A tied weight
            is there once, under its first name.

    Raises:
        ConfigurationError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.record: CheckpointRecord = read_record(path)
            index = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))
            self._writers: int = index["writers"]
            self._pieces = {
                name: sorted(map(tuple, tensor["slices"]))
                for name, tensor in index["tensors"].items()
            }
            self.shapes: dict[str, torch.Size] = {
                name: torch.Size(tensor["shape"])
                for name, tensor in index["tensors"].items()
            }
            self._check_covered()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"the checkpoint {path} cannot be read: {error}"
            ) from None
        self._files: dict[str, Any] = {}

    def _check_covered(self) -> None:
        for name, pieces in self._pieces.items():
            end = 0
            for start, stop, _ in pieces:
                if start != end:
                    raise ValueError(f"elements {end} to {start} of {name} are missing")
                end = stop
            if end != self.shapes[name].numel():
                raise ValueError(f"elements of {name} from {end} on are missing")

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor in row-major order, float32 [stop - start].

        Args:
            kind: "weight", or one of the moments of AdamW.
            name: of the tensor.

        Raises:
            ConfigurationError: a file of the checkpoint is damaged.
        """
        values = torch.empty(stop - start, dtype=torch.float32)
        pieces = self._pieces[name]
        first = bisect.bisect_right(pieces, start, key=lambda piece: piece[1])
        for begin, end, writer in pieces[first:]:
            if begin >= stop:
                break
            low, high = max(begin, start), min(end, stop)
            file = tensor_file_name(kind, writer, self._writers)
            key = TensorSlice(name, begin, end).key(kind)
            try:
                stored = self._open(file).get_slice(key)
                values[low - start : high - start] = stored[low - begin : high - begin]
            except (OSError, SafetensorError) as error:
                raise ConfigurationError(
                    f"{self.path / file} cannot be read: {error}"
                ) from None
        return values

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a checkpoint of another model than one with tensors of these shapes.

        Raises:
            ConfigurationError: names or shapes differ.
        """
        for name in sorted(shapes.keys() ^ self.shapes.keys()):
            raise ConfigurationError(
                f"{self.path} is of another model: {name} is only in "
                f"{'the model' if name in shapes else 'the checkpoint'}"
            )
        for name, shape in shapes.items():
            if list(shape) != list(self.shapes[name]):
                raise ConfigurationError(
                    f"{self.path} is of another model: {name} is "
                    f"{list(self.shapes[name])}, not {list(shape)}"
                )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            handle = safe_open(self.path / file, framework="pt")
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

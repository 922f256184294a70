"""Reading the tensors of a checkpoint, whole or in part, for a run or for use outside."""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ten_dist.checkpoint.layout import (
    INDEX_NAME,
    WEIGHT,
    TensorSlice,
    tensor_file_name,
)
from ten_dist.checkpoint.record import read_record
from ten_dist.checkpoint.tensor_file import write_tensors
from ten_dist.errors import ConfigurationError
from ten_dist.files import replaced


class CheckpointReader(contextlib.ExitStack):
    """Tensors of one checkpoint, as a context. Only what is asked for is read.

    Attributes:
        path: folder of the checkpoint.
        record: what it says of itself, see :mod:`ten_dist.checkpoint.record`.
        shapes: shape of every tensor by its name: parameters, then buffers. A tied weight
            is there once, under its first name.

    Raises:
        ConfigurationError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}
        self._files: dict[str, Any] = {}
        try:
            self.record = read_record(path)
            index = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))
            self._writers: int = index["writers"]
            for name, tensor in index["tensors"].items():
                self._add(name, torch.Size(tensor["shape"]), sorted(tensor["slices"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"the checkpoint {path} cannot be read: {error}"
            ) from None

    def _add(self, name: str, shape: torch.Size, pieces: list[list[int]]) -> None:
        self.shapes[name] = shape
        self._pieces[name] = [(start, stop, writer) for start, stop, writer in pieces]
        end = 0
        for start, stop, _ in [*self._pieces[name], (shape.numel(), 0, 0)]:
            if start != end:
                raise ValueError(f"elements {end} to {start} of {name} are missing")
            end = stop

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor in row-major order, float32 [stop - start].

        Args:
            kind: "weight", or one of the moments, which a buffer has none of.
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

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Set all parameters and buffers of `model`.

        Raises:
            ConfigurationError: it is damaged, or of a model of another shape.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(self.tensor(WEIGHT, name))

    def export(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write all parameters and buffers to one safetensors file, complete or absent.

        One tensor at a time is in memory.

        Args:
            path: where to; a file that is there is replaced.
            dtype: float32, bfloat16 or float16.

        Raises:
            ConfigurationError: the checkpoint is damaged.
            OSError: the file system refuses.
        """
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))

        def read(name: str) -> Tensor:
            return self.tensor(WEIGHT, name).to(dtype)

        with replaced(path) as temporary:
            write_tensors(temporary, self.shapes, dtype, read)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            handle = safe_open(self.path / file, framework="pt")
            self._files[file] = self.enter_context(handle)
        return self._files[file]

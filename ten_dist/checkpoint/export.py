"""The weights of a checkpoint in one safetensors file, for use outside of a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from ten_dist.checkpoint.layout import WEIGHT
from ten_dist.checkpoint.reading import CheckpointReader
from ten_dist.checkpoint.tensor_file import sync, write_tensors
from ten_dist.files import removed_on_error, temporary_of


def export_weights(
    reader: CheckpointReader, path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write all parameters and buffers to one file, complete or absent.

    One tensor at a time is in memory.

    Args:
        reader: the checkpoint.
        path: where to; a file that is there is replaced.
        dtype: float32, bfloat16 or float16.

    Raises:
        ConfigurationError: the checkpoint is damaged.
        OSError: the file system refuses.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    temporary = temporary_of(path)
    with removed_on_error(temporary):
        write_tensors(
            temporary,
            reader.shapes,
            dtype,
            lambda name: reader.tensor(WEIGHT, name).to(dtype),
        )
        sync(temporary)
        os.replace(temporary, path)

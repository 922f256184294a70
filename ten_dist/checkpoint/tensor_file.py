"""Writing a safetensors file as a stream.

The library's own writer first makes a second copy of all tensors in memory. Here they go
to the file from where they are, and their checksum is taken on the way. The format: the
length of the header as a little-endian 64-bit number, the header, which is JSON of
dtype, shape and place of every tensor, and the tensors
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ten_dist.checkpoint.layout import FileRecord

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
) -> FileRecord:
    """Write tensors to a new file, which is not brought to the disk.

    Args:
        path: the file.
        shapes: of all tensors, by name.
        dtype: of all tensors: float32, bfloat16 or float16.
        read: gives a tensor by its name, contiguous and in host memory; asked for one
            after the other, so that they need not be in memory together.

    Raises:
        OSError: the file system refuses; a partial file is left.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    crc32 = zlib.crc32(head)
    # The checksum costs about half of what the write does: another core has the time.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as checksums:
        file.write(head)
        for name in shapes:
            data = read(name).view(-1).view(torch.uint8).numpy().data
            checksum = checksums.submit(zlib.crc32, data, crc32)
            file.write(data)
            crc32 = checksum.result()
    return FileRecord(len(head) + offset, crc32)

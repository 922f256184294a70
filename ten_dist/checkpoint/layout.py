"""What lies in a checkpoint folder, and whether it is whole.

```
step_00000500/
  checkpoint.json                   the record: step, consumed rows, metrics, identity of
                                    the run, loss of the probe, files with their checksums
  index.json                        shape of every tensor, and which slices of it lie where
  weights-00000-of-00004.safetensors   slices that rank 0 wrote, float32
  moments-00000-of-00004.safetensors   AdamW's two moments of the same slices
  ...
```
A slice is a range of the elements of one tensor in row-major order. Which rank wrote
which slice follows from the number of ranks and the ZeRO stage of the run that wrote
them, and means nothing to the one that reads: slices of a tensor cover it exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

CHECKPOINT_FORMAT = "ten_dist.checkpoint"
CHECKPOINT_VERSION = 2
RECORD_NAME = "checkpoint.json"
INDEX_NAME = "index.json"

WEIGHT = "weight"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)

_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """Elements [start, stop) of a tensor in row-major order."""

    name: str
    start: int
    stop: int

    def key(self, kind: str) -> str:
        """Name of the slice in the file that holds it."""
        return f"{kind}.{self.name}[{self.start}:{self.stop}]"


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size of a file in bytes, and its CRC-32."""

    bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read it off a file."""
        size, crc32 = 0, 0
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size += len(chunk)
                crc32 = zlib.crc32(chunk, crc32)
        return cls(size, crc32)


def tensor_file_name(kind: str, writer: int, writers: int) -> str:
    """Name of the file in which one of several ranks puts its slices of a kind."""
    return f"{_part(kind)}-{writer:05d}-of-{writers:05d}.safetensors"


def _part(kind: str) -> str:
    return "weights" if kind == WEIGHT else "moments"


def read_record(path: Path) -> dict[str, Any]:
    """What the checkpoint in a folder says of itself.

    Raises:
        OSError: there is none.
        ValueError: it is not one that this version reads.
    """
    record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != CHECKPOINT_FORMAT:
        raise ValueError("it is not the record of a checkpoint")
    if record.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"its version is {record.get('version')}, not {CHECKPOINT_VERSION}"
        )
    return record


def file_records(record: dict[str, Any]) -> dict[str, FileRecord]:
    """Files of a checkpoint by name, but for its record."""
    return {name: FileRecord(**entry) for name, entry in record["files"].items()}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder at a glance, or None.

    Sizes are compared, contents are not: see :func:`checksum_damage`.
    """
    try:
        files = file_records(read_record(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{path} has no readable {RECORD_NAME}: {reason}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected.bytes:
            return f"{file} has {file.stat().st_size} bytes instead of {expected.bytes}"
    return None


def checksum_damage(
    path: Path, part: int = 0, parts: int = 1, kind: str | None = None
) -> str | None:
    """What is wrong with the contents of a checkpoint's files, or None.

    Args:
        path: a checkpoint without damage at a glance.
        part, parts: check only every `parts`-th file, from the `part`-th on, so that
            several ranks share the work.
        kind: leave out files of tensors of other kinds.
    """
    files = file_records(read_record(path))
    if kind is not None:
        prefix = _part(kind)
        files = {name: f for name, f in files.items() if name.startswith(prefix)}
    for name in sorted(files)[part::parts]:
        try:
            found = FileRecord.of(path / name)
        except OSError as error:
            return f"{path / name} cannot be read: {error.strerror}"
        if found != files[name]:
            return f"{path / name} does not have the checksum that was recorded"
    return None

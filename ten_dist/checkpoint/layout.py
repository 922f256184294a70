"""What lies in a checkpoint folder, and whether it is whole.

```
step_00000500/
  checkpoint.json                   the record: step, consumed rows, metrics, identity of
                                    the run, loss of the probe, files with their checksums
  index.json                        shape of every tensor, and which slices of it lie where
  weights-00000-of-00004.safetensors   slices that rank 0 wrote, float32
  moments-00000-of-00004.safetensors   moments of the same slices: two of
                                    AdamW, one of Muon
  ...
```
A slice is a range of the elements of one tensor in row-major order. Which rank wrote
which slice follows from the number of ranks and the ZeRO stage of the run that wrote
them, and means nothing to the one that reads: slices of a tensor cover it exactly once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ten_dist.checkpoint.record import RECORD_NAME, FileRecord, read_record

INDEX_NAME = "index.json"

WEIGHT = "weight"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MOMENTUM = "momentum_buffer"
ADAMW_MOMENTS = (EXP_AVG, EXP_AVG_SQ)
MUON_MOMENTS = (MOMENTUM,)
MOMENTS = (*ADAMW_MOMENTS, *MUON_MOMENTS)
"""Of which each tensor has those of the optimizer that updates it."""


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """Elements [start, stop) of a tensor in row-major order."""

    name: str
    start: int
    stop: int

    def key(self, kind: str) -> str:
        """Name of the slice in the file that holds it."""
        return f"{kind}.{self.name}[{self.start}:{self.stop}]"


def tensor_file_name(kind: str, writer: int, writers: int) -> str:
    """Name of the file in which one of several ranks puts its slices of a kind."""
    return f"{_part(kind)}-{writer:05d}-of-{writers:05d}.safetensors"


def _part(kind: str) -> str:
    return "weights" if kind == WEIGHT else "moments"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder at a glance, or None.

    Sizes are compared, contents are not: see :func:`checksum_damage`.
    """
    try:
        files = read_record(path).files
    except (OSError, ValueError) as error:
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
    files = read_record(path).files
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

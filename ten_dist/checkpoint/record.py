"""What a checkpoint says of itself, and what a run needs to go on beside its tensors."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

RECORD_NAME = "checkpoint.json"

_FORMAT = "ten_dist.checkpoint"
_VERSION = 2
_CHUNK_BYTES = 1 << 24
_CHECKSUM = "crc32"


@dataclasses.dataclass(frozen=True)
class HealthState:
    """Losses and gradient norms by which the next steps are judged, and what was found."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the last healthy steps, oldest first, nats a token."""
    gradient_norms: list[float] = dataclasses.field(default_factory=list)
    """The same of gradient norms, before clipping."""
    skipped_steps: int = 0
    """Steps of the run without an update, but for those of an overflow alone."""
    consecutive: int = 0
    """Of those, the last in a row."""


@dataclasses.dataclass(frozen=True)
class LossScaleState:
    """The loss scale of training in float16."""

    value: float
    """A power of two."""
    overflowed_steps: int
    """Steps of the run whose update was left out because of the scale."""
    steps_since_change: int


@dataclasses.dataclass(frozen=True)
class RunState:
    """How far a run is: all that it needs to go on, but for weights and moments."""

    step: int = 0
    """Optimizer steps done."""
    consumed_rows: int = 0
    """Rows of data that these steps have read or left out."""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the last step and of the last validation, under the names of metrics.jsonl."""
    excluded_batches: list[int] = dataclasses.field(default_factory=list)
    """Global batches, 0-based, that no step reads."""
    health: HealthState = HealthState()
    loss_scale: LossScaleState | None = None
    """None where training is not in float16."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """Build from plain values of the fields, among other keys.

        Raises:
            KeyError, TypeError: they are not there, or of something else.
        """
        scale = values.get("loss_scale")
        return cls(
            step=values["step"],
            consumed_rows=values["consumed_rows"],
            metrics=values["metrics"],
            excluded_batches=values["excluded_batches"],
            health=HealthState(**values["health"]),
            loss_scale=None if scale is None else LossScaleState(**scale),
        )


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


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """The content of `checkpoint.json`."""

    state: RunState
    optimizer_steps: int
    """Updates that AdamW has made, which its bias correction counts."""
    probe_loss: float
    """Cross-entropy of the weights on a batch that is always the same, nats a token."""
    state_identity: dict[str, Any]
    """What must be the same for a run to load this, by option name."""
    precision: str
    world_size: int
    zero_stage: int
    held_seconds: float = 0.0
    """Seconds for which training waited for the checkpoint."""
    write_seconds: float = 0.0
    """Seconds from the first byte copied or written until the last file was complete."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """Every other file of the checkpoint, by name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; those of the state are among them."""
        values = dataclasses.asdict(self)
        values["files"] = dict(sorted(values["files"].items()))
        found = {
            "format": _FORMAT,
            "version": _VERSION,
            **values.pop("state"),
            **values,
        }
        return {**found, _CHECKSUM: _checksum(found)}

    @classmethod
    def from_dict(cls, values: Any) -> CheckpointRecord:
        """Build from what :meth:`to_dict` gave.

        Raises:
            ValueError: it is something else, of another version, or damaged.
        """
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError("it is not the record of a checkpoint")
        if values.get("version") != _VERSION:
            raise ValueError(f"its version is {values.get('version')}, not {_VERSION}")
        recorded = values.get(_CHECKSUM)  # Earlier releases recorded none.
        if recorded is not None and recorded != _checksum(values):
            raise ValueError("it does not have the checksum that it records")
        names = {field.name for field in dataclasses.fields(cls)} - {"state", "files"}
        try:
            return cls(
                state=RunState.from_dict(values),
                files={n: FileRecord(**file) for n, file in values["files"].items()},
                **{name: values[name] for name in names},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete: {error!r}") from None


def _checksum(values: dict[str, Any]) -> int:
    """Of all values but the checksum itself, as JSON has them."""
    as_read = json.loads(
        json.dumps({n: v for n, v in values.items() if n != _CHECKSUM})
    )
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def read_record(path: Path) -> CheckpointRecord:
    """What the checkpoint in a folder says of itself.

    Raises:
        OSError: there is none.
        ValueError: it is not one that this version reads.
    """
    text = (path / RECORD_NAME).read_text(encoding="utf-8")
    return CheckpointRecord.from_dict(json.loads(text))

"""Portable checkpoints: files that any number of ranks writes, and any number reads.

Nothing here needs DeepSpeed: a model is loaded from a checkpoint with torch alone.
"""

from ten_dist.checkpoint.layout import (
    ADAMW_MOMENTS,
    EXP_AVG,
    EXP_AVG_SQ,
    MOMENTS,
    MOMENTUM,
    MUON_MOMENTS,
    WEIGHT,
    TensorSlice,
    checksum_damage,
    damage,
)
from ten_dist.checkpoint.reading import CheckpointReader
from ten_dist.checkpoint.record import (
    CheckpointRecord,
    FileRecord,
    HealthState,
    LossScaleState,
    RunState,
    read_record,
)
from ten_dist.checkpoint.tensor_file import write_tensors

__all__ = [
    "ADAMW_MOMENTS",
    "EXP_AVG",
    "EXP_AVG_SQ",
    "MOMENTS",
    "MOMENTUM",
    "MUON_MOMENTS",
    "WEIGHT",
    "CheckpointReader",
    "CheckpointRecord",
    "FileRecord",
    "HealthState",
    "LossScaleState",
    "RunState",
    "TensorSlice",
    "checksum_damage",
    "damage",
    "read_record",
    "write_tensors",
]

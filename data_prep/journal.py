"""What is finished of a preparation: the records by which a later start continues it.

They lie in a hidden folder within the output while that is in preparation. A record is
written, whole, after what it speaks of is on the disk; so what has no record, or does
not agree with it, is not finished and is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.left_out import LeftOut
from ten_dist.data.manifest import ShardRecord
from ten_dist.files import write_bytes, write_json

JOURNAL_NAME = ".preparing"
_SOURCE = "source.json"
_TOKENIZER = "tokenizer.json"
_RECORD = re.compile(
    r"((source|tokenizer|unit-\d{5,})\.json|(hashes|duplicates)-\d{5,}\.npy)(\.tmp)?"
)


@dataclass
class Split:
    """One side of the held-out split of a unit: its shard, and the text behind it."""

    shard: ShardRecord | None = None
    documents: int = 0
    text_bytes: int = 0
    counted_tokens: int = 0
    """Those that the loss mask counts, of conversations."""


@dataclass
class UnitResult:
    """What came of a unit."""

    unit: int
    train: Split = field(default_factory=Split)
    val: Split = field(default_factory=Split)
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> UnitResult:
        """Read back what JSON made of its fields; ``KeyError`` where one is missing."""
        train, val = (
            Split(
                shard=side["shard"] and ShardRecord(**side["shard"]),
                documents=side["documents"],
                text_bytes=side["text_bytes"],
                counted_tokens=side["counted_tokens"],
            )
            for side in (record["train"], record["val"])
        )
        left_out = LeftOut.from_record(record["left_out"])
        return cls(record["unit"], train, val, left_out)


class Journal:
    """The records in the hidden folder of an output folder.

    Only rank 0 begins and removes it; every rank records the units that it finished.
    Methods that write raise ``OSError`` where that fails.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / JOURNAL_NAME

    @property
    def begun(self) -> bool:
        """Whether it was begun: False of one whose first record was never completed."""
        return not self.folder.is_dir() or (self.folder / _SOURCE).exists()

    def begun_with(self, identity: Mapping[str, Any]) -> bool:
        """Whether this is the journal of a preparation with that identity."""
        return _read(self.folder / _SOURCE) == dict(identity)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Start an empty journal; ``identity``, of JSON values, says what of."""
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / _SOURCE, dict(identity))

    def remove(self) -> None:
        """Remove every record, and the folder with them."""
        if not self.folder.is_dir():
            # Earlier versions marked the output with a file of this name.
            self.folder.unlink(missing_ok=True)
            return
        # Where all is done, two starts can be at this at the same time.
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                if _RECORD.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Not empty: it holds what is not ours.
            self.folder.rmdir()

    def tokenizer(self) -> str | None:
        """The JSON of the tokenizer that was trained; None if there is none, whole."""
        record = _read(self.folder / _TOKENIZER)
        if not isinstance(record, dict) or not isinstance(record.get("json"), str):
            return None
        whole = _sha256(record["json"]) == record.get("sha256")
        return record["json"] if whole else None

    def keep_tokenizer(self, text: str) -> None:
        """Record the JSON of a tokenizer."""
        record = {"sha256": _sha256(text), "json": text}
        write_json(self.folder / _TOKENIZER, record)

    def units(self, tokenizer_sha256: str) -> list[UnitResult]:
        """The units recorded as finished with a tokenizer, in order."""
        results = []
        for path in sorted(self.folder.glob("unit-*.json")):
            record = _read(path)
            with contextlib.suppress(KeyError, TypeError):
                if record["tokenizer_sha256"] == tokenizer_sha256:
                    results.append(UnitResult.from_record(record))
        return sorted(results, key=lambda result: result.unit)

    def keep_unit(self, result: UnitResult, tokenizer_sha256: str) -> None:
        """Record a unit whose shards are on the disk under their names."""
        record = {"tokenizer_sha256": tokenizer_sha256, **dataclasses.asdict(result)}
        write_json(self.folder / f"unit-{result.unit:05d}.json", record)

    def array(self, name: str, unit: int) -> np.ndarray | None:
        """The array of a name, "hashes" or "duplicates", of a unit; None if missing."""
        try:
            path = self.folder / f"{name}-{unit:05d}.npy"
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def keep_array(self, name: str, unit: int, array: np.ndarray) -> None:
        """Record an array of a unit."""
        encoded = io.BytesIO()
        np.save(encoded, array, allow_pickle=False)
        write_bytes(self.folder / f"{name}-{unit:05d}.npy", encoded.getvalue())

    def keep_only(self, units: Sequence[int]) -> None:
        """Remove the records of all other units, and what a killed rank left half."""
        kept = {f"unit-{unit:05d}.json" for unit in units}
        for path in self.folder.iterdir():
            half = _RECORD.fullmatch(path.name) and path.suffix == ".tmp"
            other = path.name.startswith("unit-") and path.name not in kept
            if half or other:
                path.unlink()


def _read(path: Path) -> Any:
    """The JSON of a file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

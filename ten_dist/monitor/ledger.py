"""The ledger: which rows each rank consumed, for proof that none is lost or repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Ledger:
    """Appends to ledger/rankNNNN.jsonl (docs/run_folder.md#ledger).

    A line is {"attempt": a, "step": s, "epoch": e, "rows": [...]}; a step has a line for
    each epoch, and for each source of a mixture, with its name as "source". `attempt`
    counts the starts of the run; of a step only the lines of its highest attempt count.
    """

    def __init__(
        self, folder: Path, rank: int, attempt: int, sources: Sequence[str] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        self._sources = sources
        path = folder / f"rank{rank:04d}.jsonl"
        if path.is_file():
            # What a kill left of a line would make the line after it unreadable.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(
        self, step: int, sources: np.ndarray, epochs: np.ndarray, rows: np.ndarray
    ) -> None:
        """Record rows [n] of sources [n] and epochs [n], consumed in optimizer step `step`."""
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T:
            line = {"attempt": self._attempt, "step": step}
            if self._sources:
                line["source"] = self._sources[source]
            line["epoch"] = int(epoch)
            line["rows"] = rows[(sources == source) & (epochs == epoch)].tolist()
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def begin_attempt(self, attempt: int) -> None:
        """Go on as another start of the run, which goes back to an earlier step."""
        self._attempt = attempt

    def close(self) -> None:
        """Close the file."""
        self._file.close()

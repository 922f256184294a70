"""anomalies.jsonl: steps whose loss or gradient was wrong, and the rows they read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def log_anomaly(
    path: Path, facts: dict[str, Any], rows: Sequence[Sequence[dict[str, Any]]]
) -> None:
    """Append a line, and bring it to the disk.

    Args:
        path: the file.
        facts: step, batch, kind, value, z_score, action.
        rows: of each rank, its micro-batches: {"epochs": [...], "rows": [...]}, and
            "sources" of a mixture.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, "rows_by_rank": list(rows)}) + "\n")
        file.flush()
        os.fsync(file.fileno())

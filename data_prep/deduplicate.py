"""Which documents say exactly what an earlier one says.

Ranks hash the documents of their units and leave the hashes beside the records of the
preparation; rank 0 joins them, in the corpus's order, and says which to leave out.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from data_prep.documents import unit_documents
from data_prep.journal import Journal
from data_prep.left_out import LeftOut
from data_prep.plan import CorpusPlan
from data_prep.ranks import Ranks, Tick, work_on_units

HASH_BYTES = 16
PEAK_BYTES = 24
"""Memory that :func:`find_duplicates` takes for each document, hashes included."""
_BUCKETS = 16


def mark_duplicates(ranks: Ranks, plan: CorpusPlan, journal: Journal) -> None:
    """Record for every unit which of its documents are copies of earlier ones.

    Every rank must call it. What an earlier start recorded is not done again.

    Raises:
        ConfigurationError: on every rank, where one found a malformed line.
        FileError: on every rank, where one could not read or write a file.
    """
    units = range(len(plan.units))

    def lacking(name: str) -> list[int]:
        return [unit for unit in units if journal.array(name, unit) is None]

    missing = ranks.from_root(
        lambda: lacking("hashes") if lacking("duplicates") else None
    )
    if missing is None:
        return

    def keep_hashes(unit: int, tick: Tick) -> None:
        joined = bytearray()
        for document in unit_documents(
            plan.units[unit], plan.selection, LeftOut(), None, tick
        ):
            joined += document.digest(HASH_BYTES)
        hashes = np.frombuffer(joined, dtype="<u8").reshape(-1, 2)
        journal.keep_array("hashes", unit, hashes)

    work_on_units(ranks, keep_hashes, "comparing", plan.sizes, missing)

    def hashes_of(unit: int) -> np.ndarray:
        return cast(np.ndarray, journal.array("hashes", unit))

    def mark() -> None:
        ends = np.cumsum([len(hashes_of(unit)) for unit in units])
        joined = np.empty((ends[-1], 2), dtype=np.uint64)
        for unit, end in zip(units, ends):
            hashes = hashes_of(unit)
            joined[end - len(hashes) : end] = hashes
        for unit, copies in enumerate(np.split(find_duplicates(joined), ends[:-1])):
            journal.keep_array("duplicates", unit, np.flatnonzero(copies))

    ranks.from_root(mark)


def find_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Which rows are equal to an earlier row.

    Args:
        hashes: [documents, 2] uint64, evenly distributed.

    Returns:
        [documents] bool. Takes :data:`PEAK_BYTES` a document, ``hashes`` included.
    """
    copies = np.zeros(len(hashes), dtype=bool)
    # A sixteenth at a time, told apart by one byte: sorting takes far more than hashes.
    low_byte = hashes.view(np.uint8)[:, 0] if len(hashes) else copies
    for bucket in range(_BUCKETS):
        rows = np.flatnonzero(low_byte % _BUCKETS == bucket)
        part = hashes[rows]
        # Stable: of equal rows the earliest comes first.
        order = np.lexsort((part[:, 1], part[:, 0]))
        part = part[order]
        equal = (part[1:] == part[:-1]).all(axis=1)
        copies[rows[order[1:][equal]]] = True
    return copies

"""Which documents say exactly what an earlier one says.

Ranks hash the documents of their units and leave the hashes beside the records of the
preparation; rank 0 joins them, in the corpus's order, and says which to leave out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.documents import Selection, unit_documents
from data_prep.journal import Journal
from data_prep.left_out import LeftOut
from data_prep.progress import work_with_bar
from data_prep.ranks import Ranks, Tick, assign_units
from data_prep.segment import Segment

HASH_BYTES = 16
PEAK_BYTES = 24
"""Memory that :func:`find_duplicates` takes for each document, hashes included."""
_BUCKETS = 16


def mark_duplicates(
    ranks: Ranks,
    units: Sequence[Sequence[Segment]],
    selection: Selection,
    journal: Journal,
) -> None:
    """Record for every unit which of its documents are copies of earlier ones.

    Every rank must call it. What an earlier start recorded is not done again.

    Raises:
        ConfigurationError: on every rank, where one found a malformed line.
        FileError: on every rank, where one could not read or write a file.
    """
    missing = ranks.from_root(lambda: _missing(journal, len(units)))
    if missing is None:
        return
    sizes = [sum(segment.bytes for segment in unit) for unit in units]
    share = assign_units([sizes[unit] for unit in missing], ranks.size)[ranks.rank]

    def job(tick: Tick) -> None:
        for unit in (missing[index] for index in share):
            journal.keep_array("hashes", unit, _hashes(units[unit], selection, tick))

    rest = sum(sizes[unit] for unit in missing)
    work_with_bar(ranks, job, "comparing", sum(sizes), sum(sizes) - rest)

    def mark() -> None:
        hashes = _joined(journal, len(units))
        start, copies = 0, find_duplicates(hashes)
        for unit in range(len(units)):
            count = len(journal.array("hashes", unit))
            copied = np.flatnonzero(copies[start : start + count])
            journal.keep_array("duplicates", unit, copied)
            start += count

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


def _hashes(
    segments: Sequence[Segment], selection: Selection, tick: Tick
) -> np.ndarray:
    joined = bytearray()
    for document in unit_documents(segments, selection, LeftOut(), None, tick):
        joined += document.digest(HASH_BYTES)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def _missing(journal: Journal, units: int) -> list[int] | None:
    """The units whose hashes are not there; None if all duplicates are marked."""
    if all(journal.array("duplicates", unit) is not None for unit in range(units)):
        return None
    return [unit for unit in range(units) if journal.array("hashes", unit) is None]


def _joined(journal: Journal, units: int) -> np.ndarray:
    counts = [len(journal.array("hashes", unit)) for unit in range(units)]
    joined = np.empty((sum(counts), 2), dtype=np.uint64)
    start = 0
    for unit, count in enumerate(counts):
        joined[start : start + count] = journal.array("hashes", unit)
        start += count
    return joined

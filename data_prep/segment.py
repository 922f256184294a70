"""A part of the corpus that is read in one go: a file, or a range of its lines or rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes ``start`` to ``stop`` of a file.

    ``identity`` names it within the corpus, whatever machine that lies on. ``format`` is
    "jsonl", of which it holds the lines that begin in the range; "parquet", of which it
    holds ``row_group``, and the bytes are those of the text column; "jsonl.gz" or so,
    or "text", which may be compressed, too: of these it holds all.
    """

    identity: str
    path: str
    start: int
    stop: int
    format: str
    row_group: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def file(self) -> str:
        """What the file is called within the corpus."""
        if self.format in ("jsonl", "parquet"):
            return self.identity.rpartition("@")[0]
        return self.identity

    @property
    def positions(self) -> str:
        """What the positions of its texts count, as in :class:`Place`."""
        return {"text": "", "jsonl": "byte", "parquet": "row"}.get(self.format, "line")

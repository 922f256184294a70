"""A document that is in memory: what is asked of it, whatever it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from data_prep.left_out import Place
from data_prep.pieces import ANYWHERE, Cuts, cut_pieces


class Document:
    """A text in memory: ``bytes`` is its size in UTF-8, ``characters`` its length.

    A byte order mark at its beginning is no part of it. ``place`` says where it lies,
    ``note`` names, in :data:`NOTES`, what to tell the user about it.
    """

    place = Place("")
    note: str | None = None

    def __init__(self, text: str) -> None:
        text = text.removeprefix("\ufeff")
        self._text = text
        self._data = text.encode("utf-8")
        self.bytes = len(self._data)
        self.characters = len(text)
        self.blank = not text.strip()

    def digest(self, size: int) -> bytes:
        """The blake2b digest of the text in UTF-8: 8 or 16 bytes."""
        return hashlib.blake2b(self._data, digest_size=size).digest()

    def is_held_out(self, val_fraction: float) -> bool:
        """Whether the document is held out for validation.

        It depends on the document's text alone, so a document stays on its side when
        the corpus grows, and copies of one document all fall on one side.
        """
        return int.from_bytes(self.digest(8), "big") / 2**64 < val_fraction

    def pieces(self, cuts: Cuts | None = ANYWHERE) -> Iterator[str]:
        """The text, cut where ``cuts`` allows: an encoding takes far more than its text."""
        return cut_pieces([self._text], cuts)

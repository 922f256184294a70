"""What a preparation does not use: counted by reason, and the first few of each named.

Nothing else is kept of it, so that a corpus of a million files takes no more memory.
Which few those are depends on the corpus alone, not on who read which part of it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ten_dist.files import printable

NAMED = 3
"""How many of each reason are named."""

REASONS = {
    "unknown_name": "files whose names are not those of text (--include takes them)",
    "not_included": "files that match no --include",
    "excluded": "files or folders that match --exclude",
    "hidden_folder": "hidden folders (--input takes them)",
    "linked_folder": "links to folders (not followed; --input takes them)",
    "broken_link": "links that lead nowhere",
    "special": "sockets, pipes or devices",
    "repeated": "further names or links of files that are read once",
    "empty": "empty files",
    "json": "JSON files that are not lines with the field of --text_field "
    "(`jq -c '.[]' FILE > FILE.jsonl` makes lines of an array)",
    "not_lines": "files that are not JSON Lines, which --chat reads",
    "no_conversation": "lines that are no conversation",
    "not_utf8": "not text in UTF-8",
    "null": "nulls",
    "blank": "blank texts",
    "blank_line": "blank lines",
    "too_short": "texts shorter than --min_length",
    "duplicate": "copies of earlier texts",
}
"""What is said of each reason, behind its count."""
NOTES = {
    "json_as_text": "text files that look like JSON Lines, read as plain text (name "
    "them .jsonl to have the field read)",
    "separator_within": "conversations in which the template writes the separator, where "
    "--document_masking begins anew (--separator names another token)",
}
"""The same for what is used, but perhaps not as it was meant."""


class Place(NamedTuple):
    """Where in the corpus something lies, in the order in which places are named."""

    file: str
    """The file's name within the corpus, as :func:`printable` shows it."""
    position: int = 0
    unit: str = ""
    """What ``position`` counts: "byte", from 0, or "line" or "row", from 1; "" of all."""
    note: str = ""
    """What it was found to be."""

    def __str__(self) -> str:
        name = self.file
        if self.unit == "line":
            name += f":{self.position}"
        elif self.unit:
            name += f" {self.unit} {self.position}"
        return f"{name} ({self.note})" if self.note else name


@dataclass(frozen=True)
class Unusable:
    """Stands for a text that cannot be used: a name of :data:`REASONS`, and a note."""

    reason: str
    note: str = ""


NULL = Unusable("null")
NOT_UTF8 = Unusable("not_utf8")


@dataclass
class LeftOut:
    """Counts, and the first places in order, by the names of :data:`REASONS`."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Place]] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LeftOut:
        """Read back what JSON made of its fields."""
        first = {
            reason: [Place(*place) for place in places]
            for reason, places in record["first"].items()
        }
        return cls(dict(record["counts"]), first)

    def add(self, reason: str, place: Place, count: int = 1) -> None:
        """Count one more, or several with this one the first."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        places = self.first.setdefault(reason, [])
        if len(places) < NAMED or place < places[-1]:
            bisect.insort(places, place)
            del places[NAMED:]

    def add_file(self, reason: str, name: str, note: str = "") -> None:
        """Count one more file, by its name within the corpus."""
        self.add(reason, Place(printable(name), note=note))

    def forget(self, reason: str) -> None:
        """Take a reason back."""
        self.counts.pop(reason, None)
        self.first.pop(reason, None)

    def merge(self, other: LeftOut) -> None:
        """Add what another part of the corpus has."""
        for reason, count in other.counts.items():
            for place in other.first[reason]:
                self.add(reason, place, 0)
            self.counts[reason] += count

    def relabelled(self, change: Callable[[Place], Place]) -> LeftOut:
        """The same with other places."""
        first = {
            reason: [change(place) for place in places]
            for reason, places in self.first.items()
        }
        return LeftOut(self.counts, first)

    def summary(self) -> dict[str, Any]:
        """Counts and first places of what was left out, of JSON values."""
        return {
            reason: {
                "count": self.counts[reason],
                "first": [str(place) for place in self.first[reason]],
            }
            for reason in REASONS
            if reason in self.counts
        }

    def lines(self) -> list[str]:
        """A line for each reason for which something was left out."""
        return [self._line(*item) for item in REASONS.items() if item[0] in self.counts]

    def notes(self) -> list[str]:
        """A line for each of :data:`NOTES` that there was."""
        return [self._line(*item) for item in NOTES.items() if item[0] in self.counts]

    def _line(self, reason: str, label: str) -> str:
        count, places = self.counts[reason], self.first[reason]
        more = ", ..." if count > len(places) else ""
        return f"{count} {label}: {', '.join(map(str, places))}{more}"

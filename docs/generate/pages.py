"""The pages that are generated in part, the text between two markers, and their anchors."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m docs.generate"


def with_part(page: str, part: str, text: str) -> str:
    """The text of a page with one generated part replaced.

    Args:
        page: path of the page in the repository.
        part: name of the part, which stands between `<!-- begin PART ... -->` and
            `<!-- end PART -->`.
        text: what is to stand between them.

    Raises:
        ValueError: the page has no such markers.
    """
    begin = f"<!-- begin {part}: made by `{COMMAND}` -->"
    end = f"<!-- end {part} -->"
    before, found, rest = (ROOT / page).read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} lacks the lines '{begin}' and '{end}'")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def anchor(title: str) -> str:
    """What a link to the section of a title ends with, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")

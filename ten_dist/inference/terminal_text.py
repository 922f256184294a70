"""Text of a model on a terminal, which obeys control characters."""

from __future__ import annotations

import sys
import unicodedata


def show(text: str) -> None:
    """Write a piece of text to the standard output at once.

    To a pipe as it is. On a terminal, control characters other than line ends and tabs
    appear as escape sequences: a terminal would be cleared, or made to answer, by them.
    """
    if sys.stdout.isatty():
        text = "".join(map(_harmless, text))
    sys.stdout.write(text)
    sys.stdout.flush()


def _harmless(character: str) -> str:
    if unicodedata.category(character) == "Cc" and character not in "\n\t":
        return character.encode("unicode_escape").decode("ascii")
    return character

"""The text of a continuation, as its tokens come.

Tokens are not pieces of text: a character may be made of several, and what a token says can
depend on the one before it. Text is given out when no token to come can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Of the prompt, what can change how the first tokens after it read.
_CONTEXT = 8
# UTF-8 has at most four bytes a character, and a token at least one.
_MOST_UNFINISHED = 3
_UNFINISHED = "\ufffd"


class TextStream:
    """Turns tokens into text, up to the first of some stop strings.

    Args:
        decode: the text of a sequence of token ids.
        prompt: the ids that were read before, as far as they are known.
        stop: texts that end the continuation, and do not belong to it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._context = list(prompt[-_CONTEXT:])
        self._known = decode(self._context) if self._context else ""
        self._held: list[int] = []
        self._stop = [text for text in stop if text]
        self._pending = ""
        self.stopped = False
        """Whether a stop string has come; nothing comes behind it."""

    def push(self, *tokens: int) -> str:
        """The text that is certain now that these have come; often one word, or none."""
        if self.stopped:
            return ""
        self._held += tokens
        text = self._certain_text()
        return self._up_to_stop(text) if text else ""

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._up_to_stop(
            self._decode(self._context + self._held)[len(self._known) :]
        )
        self._held = []
        rest = "" if self.stopped else self._pending
        self._pending = ""
        return text + rest

    def _certain_text(self) -> str:
        decoded = self._decode(self._context + self._held)
        if not decoded.startswith(self._known):
            # These tokens may finish a character that the prompt has begun.
            self._known = self._known.rstrip(_UNFINISHED)
            if not decoded.startswith(self._known):
                return ""
        if not decoded.endswith(_UNFINISHED):
            return self._give(len(self._held), decoded)
        # What is older than the longest character is not going to be finished.
        old = len(self._held) - _MOST_UNFINISHED
        if old > 0:
            before = self._decode(self._context + self._held[:old])
            if decoded.startswith(before):
                return self._give(old, before)
        return ""

    def _give(self, tokens: int, decoded: str) -> str:
        """The text of the first `tokens` held ones, which become the context."""
        text = decoded[len(self._known) :]
        self._context, self._held = self._held[:tokens], self._held[tokens:]
        self._known = self._decode(self._context)
        return text

    def _up_to_stop(self, text: str) -> str:
        """`pending` and `text` without what is, or may become, a stop string."""
        text, self._pending = self._pending + text, ""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin the stop string."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)

"""The answer to a request while it comes about: pieces of text and tokens, choice by choice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from ten_dist.generation import Request, Token
from ten_dist.generation.text_stream import TextStream
from ten_dist.serving.worker import Draining, Job, Worker, happens_within

_MOST_PIECES_A_SECOND = 200
"""Of all answers together: where many come about at once, a piece has several tokens, and
the time of the processor goes into the model."""


class Piece(NamedTuple):
    """What one choice has got since its last piece."""

    choice: int
    text: str
    tokens: list[Token]
    finish_reason: str | None


class TimedOut(Exception):
    """An answer has taken longer than it may."""


class ModelFailed(Exception):
    """The model could not be computed."""


class Choice:
    """One continuation, as text.

    Args:
        job: that makes it.
        decode: the text of token ids.
        stop: texts that end it.
    """

    def __init__(
        self, job: Job, decode: Callable[[Sequence[int]], str], stop: Sequence[str]
    ) -> None:
        self.job = job
        self.finish_reason: str | None = None
        self.taken = 0
        """Tokens that are part of it."""
        self._stream = TextStream(decode, job.request.prompt, stop)
        # Tokens one by one where each is shown, or where the last one is to be known.
        self._singly = bool(stop) or job.request.logprobs is not None

    def take(self) -> tuple[str, list[Token]]:
        """Text and tokens that have come since the last call."""
        reason = self.job.finish_reason
        new = self.job.tokens[self.taken :]
        stop_ids = self.job.request.stop_ids
        shown = [token for token in new if token.id not in stop_ids]
        if self._singly:
            text, shown = self._take_singly(shown)
        else:
            text = self._stream.push(*(token.id for token in shown))
        self.taken += len(new)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif reason is not None:
            text += self._stream.finish()
            self.finish_reason = "stop" if self._stream.stopped else reason
        return text, shown

    def _take_singly(self, tokens: list[Token]) -> tuple[str, list[Token]]:
        text, taken = "", []
        for token in tokens:
            text += self._stream.push(token.id)
            taken.append(token)
            if self._stream.stopped:
                break
        return text, taken


class Answer:
    """All choices of a request.

    Args:
        worker: takes the requests.
        requests: one for each choice.
        stop: texts that end a choice.
        decode: the text of token ids.
        seconds: how long it may take.

    Raises:
        QueueFull, Draining: as :meth:`Worker.submit`.
    """

    def __init__(
        self,
        worker: Worker,
        requests: Sequence[Request],
        stop: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        seconds: float,
    ) -> None:
        self._worker = worker
        self._news = asyncio.Event()
        self._deadline = time.monotonic() + seconds
        jobs = worker.submit(list(requests), self._news)
        self.choices = [Choice(job, decode, stop) for job in jobs]

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices, as they come; the last one of each has a reason.

        Whoever stops to listen lets go of the rest.

        Raises:
            TimedOut: it takes too long.
            ModelFailed: the model could not be computed.
            Draining: the server ends before the answer does.
        """
        open_choices = dict(enumerate(self.choices))
        try:
            while open_choices:
                came = False
                for number, choice in list(open_choices.items()):
                    text, tokens = choice.take()
                    if choice.job.failure is not None:
                        raise ModelFailed("the model failed") from choice.job.failure
                    if choice.finish_reason == "cancelled":
                        raise Draining
                    if choice.finish_reason is not None:
                        del open_choices[number]
                        self._worker.cancel(choice.job)
                    elif not text and not tokens:
                        continue
                    came = True
                    yield Piece(number, text, tokens, choice.finish_reason)
                if open_choices:
                    await self._wait(came)
        finally:
            for choice in open_choices.values():
                self._worker.cancel(choice.job)

    async def _wait(self, came: bool) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimedOut
        if came:
            unfinished = self._worker.running + self._worker.waiting
            await asyncio.sleep(min(unfinished / _MOST_PIECES_A_SECOND, left))
        if not await happens_within(self._news, left):
            raise TimedOut
        self._news.clear()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; each once, however often it is continued."""
        prompts = {id(c.job.request.prompt): c.job.request.prompt for c in self.choices}
        return sum(map(len, prompts.values()))

    @property
    def longest(self) -> int:
        """Tokens of the longest choice so far."""
        return max(choice.taken for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.taken for choice in self.choices)

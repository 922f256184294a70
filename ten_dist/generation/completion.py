"""A continuation as text, while a decoder works at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ten_dist.generation.decoder import Decoder, Request
from ten_dist.generation.text_stream import TextStream


class Completion:
    """The text of a request's continuation, up to the first of some stop strings.

    Args:
        decoder: takes the request, and is stepped by the caller.
        request: the text of its stop tokens does not belong to the continuation.
        decode: the text of a sequence of token ids.
        stop: texts that end the continuation, and do not belong to it.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: Request,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
    ) -> None:
        self.generated = decoder.add(request)
        self._decoder = decoder
        self._stream = TextStream(decode, request.prompt, stop)
        self._taken = 0
        self._finished = False

    def take(self) -> str:
        """The text that has become certain since the last call.

        To be called after each step of the decoder: at a stop string it cancels the rest.
        """
        generated, pieces = self.generated, []
        for token in generated.tokens[self._taken :]:
            self._taken += 1
            if token.id not in generated.request.stop_ids:
                pieces.append(self._stream.push(token.id))
        if self._stream.stopped:
            self._decoder.cancel(generated)
        if generated.finish_reason is not None and not self._finished:
            self._finished = True
            pieces.append(self._stream.finish())
        return "".join(pieces)

    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"] | None:
        """Why it has ended: a stop token or string, the length, or :meth:`Decoder.cancel`."""
        return "stop" if self._stream.stopped else self.generated.finish_reason

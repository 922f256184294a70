"""A conversation as the state that it has left in the model, and not as its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.generation import Decoder, Request, Sampling
from ten_dist.generation.completion import Completion
from ten_dist.inference.turn_tokens import TurnTokens
from ten_dist.model.network import NetworkState


@dataclasses.dataclass(frozen=True)
class ConversationState:
    """How far a conversation is, whatever its length."""

    network: NetworkState | None = None
    """Of one row that has read all but `unread`; None before the first turn."""
    unread: tuple[int, ...] = ()
    """The last tokens, which the next turn reads first."""
    answer_ended: bool = True
    """Whether the last answer has its end; else the next turn gives it one."""
    turns: int = 0
    """Answers so far."""
    tokens: int = 0
    """Of the whole conversation."""


class Conversation:
    """Answers what is said to it; each turn reads its own tokens alone.

    Args:
        decoder: of the model; without other requests.
        turns: the tokens of what is said.
        tokenizer: of the model.
        sampling: how answers are drawn; number n with seed + n.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        turns: TurnTokens,
        tokenizer: TextTokenizer,
        sampling: Sampling,
        max_new_tokens: int,
    ) -> None:
        self.state = ConversationState()
        self.max_new_tokens = max_new_tokens
        self.finish_reason: str | None = None
        """Why the last answer has ended, see :class:`Completion`."""
        self._decoder = decoder
        self._turns = turns
        self._tokenizer = tokenizer
        self._sampling = sampling
        end, separator = turns.end, tokenizer.separator_id
        # An end of several tokens is found as text.
        self._stop_ids = {separator, *end} if len(end) == 1 else {separator}
        self._stop = [] if len(end) == 1 else [tokenizer.decode(end)]

    def answer(
        self, said: str, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """The answer, piece by piece; the conversation has gone on when it is complete.

        Args:
            said: by the user.
            stopped: asked before each token whether to leave it at that. If nothing has
                been read by then, nothing has been said.

        Raises:
            DataError: the template or the tokenizer does not take it.
        """
        before = self.state
        prompt = list(before.unread)
        if before.network is None:
            prompt += self._turns.opening(said)
        else:
            prompt += [] if before.answer_ended else self._turns.end
            prompt += self._turns.following(said)
        seed = (self._sampling.seed + before.turns) % 2**63
        request = Request(
            prompt=prompt,
            max_new_tokens=self.max_new_tokens,
            sampling=dataclasses.replace(self._sampling, seed=seed),
            stop_ids=self._stop_ids,
            state=before.network,
        )
        decode = self._tokenizer.decode
        completion = Completion(self._decoder, request, decode, self._stop)
        while completion.finish_reason is None:
            if stopped():
                self._decoder.cancel(completion.generated)
            else:
                self._decoder.step()
            yield completion.take()
        self.finish_reason = completion.finish_reason
        self.state = self._after(completion)

    def empty_state(self) -> NetworkState:
        """The state of the model before any conversation."""
        return self._decoder.empty_state()

    def _after(self, completion: Completion) -> ConversationState:
        """The state that an answer leaves."""
        generated, before = completion.generated, self.state
        if generated.state is None:
            return before
        read = [*generated.request.prompt, *generated.ids]
        unread, ended = tuple(read[-1:]), completion.finish_reason == "stop"
        separator = self._tokenizer.separator_id
        if ended and unread == (separator,) and self._turns.end != [separator]:
            # It would end the conversation: the answer alone is to end.
            unread, ended = (), False
        in_state = before.tokens - len(before.unread) + len(read) - 1
        return ConversationState(
            generated.state, unread, ended, before.turns + 1, in_state + len(unread)
        )

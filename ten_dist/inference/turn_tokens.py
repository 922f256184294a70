"""The tokens that each turn adds to a conversation, worked out from a chat template.

A template is a function of a whole conversation. Who keeps a state and not the text has to
know what it adds for one more turn; that is learned from short conversations made up here,
and is refused where it depends on what was said before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ten_dist.data.chat_template import ChatTemplate, Message
from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import ConfigurationError


def _user(said: str) -> Message:
    return {"role": "user", "content": said}


def _exchange(said: str, answer: str) -> list[Message]:
    return [_user(said), {"role": "assistant", "content": answer}]


class TurnTokens:
    """What a user says as the tokens to read, the answer's beginning included.

    Args:
        template: of conversations.
        tokenizer: of the model.
        system: what the conversation starts with, in the role "system", if anything.

    Raises:
        DataError: the template does not take such messages.
        ConfigurationError: it does not write a conversation turn by turn, or does not end
            an answer.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: TextTokenizer,
        system: str | None = None,
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._start: list[Message] = []
        if system is not None:
            self._start.append({"role": "system", "content": system})
        self.end: list[int] = template.turn_end(tokenizer).tolist()
        """Tokens that end an answer."""
        if not self.end:
            raise ConfigurationError(
                "the chat template writes nothing behind what the assistant says: nobody "
                "could tell where an answer ends"
            )
        self._check()

    def opening(self, said: str) -> list[int]:
        """Tokens of the first turn of a conversation."""
        ids, _ = self._encode([*self._start, _user(said)], add_generation_prompt=True)
        return ids

    def following(self, said: str) -> list[int]:
        """Tokens of a later turn, behind the end of the answer before it."""
        return self._behind(_exchange("a", "b"), said)

    def _behind(self, before: Sequence[Message], said: str) -> list[int]:
        ids, mask = self._encode(
            [*self._start, *before, _user(said)], add_generation_prompt=True
        )
        return ids[self._last_end(ids, mask) :]

    def _through_answer(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to the end of its last answer."""
        ids, mask = self._encode([*self._start, *messages])
        return ids[: self._last_end(ids, mask)]

    def _last_end(self, ids: list[int], mask: list[bool]) -> int:
        """Where the last end of an answer is over.

        Raises:
            ConfigurationError: there is none of the same tokens.
        """
        length = len(self.end)
        for stop in range(len(ids), length - 1, -1):
            within = all(mask[stop - length : stop])
            if within and ids[stop - length : stop] == self.end:
                return stop
        raise ConfigurationError(
            "the end of an answer is not the same tokens behind every text, by the chat "
            "template and the tokenizer of this run: a conversation cannot go on from it"
        )

    def _check(self) -> None:
        """Refuse a template that does not write a conversation turn by turn."""
        first, second = _exchange("a", "b"), _exchange("c", "d")
        one, two = (self._through_answer(h) for h in (first, [*first, *second]))
        begun = one + self._behind(first, "c")
        same = self._behind(first, "e") == self._behind([*first, *second], "e")
        opening = self.opening("a")
        if not (same and one[: len(opening)] == opening and two[: len(begun)] == begun):
            raise ConfigurationError(
                "what the chat template makes of a conversation does not begin with what "
                "it makes of the turns before its last one: from a state, to which tokens "
                "can only be added, such a conversation cannot go on"
            )

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        ids, mask = self._template.encode(
            messages, self._tokenizer, add_generation_prompt
        )
        return ids.tolist(), mask.tolist()

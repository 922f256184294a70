"""Conversations of a corpus: what the lines of JSON must have, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.left_out import NOT_UTF8, Unusable
from data_prep.text_document import Document
from ten_dist.data.chat_template import ChatTemplate, Message, check_messages
from ten_dist.data.shards import marked
from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import DataError


class Conversation(Document):
    """A conversation, whose text is what the template makes of it.

    Args:
        template: which makes text of it.
        messages: of it, checked.
        prompt: how many of them lead up to what is learned.
        separator: of the tokenizer.

    Raises:
        DataError: the template does not take it.
        UnicodeEncodeError: it holds what is no text.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        prompt: int,
        separator: str,
    ) -> None:
        super().__init__(template.render(messages, separator=separator))
        self._template = template
        self._messages = messages
        self._prompt = prompt

    def tokens(self, tokenizer: TextTokenizer) -> np.ndarray:
        """Its marked tokens, uint32 [n], with the separator at its end.

        Raises:
            DataError: the template does not take it, or the assistant says nothing.
        """
        ids, mask = self._template.encode(self._messages, tokenizer)
        prompt = self._messages[: self._prompt]
        if any(message["role"] == "assistant" for message in prompt):
            led_up, _ = self._template.encode(prompt, tokenizer, True)
            if not np.array_equal(led_up, ids[: led_up.size]):
                raise DataError("its tokens do not begin with those of its prompt")
            mask[: led_up.size] = False
        if not mask.any():
            raise DataError("the assistant says nothing in it")
        if ids[-1] != tokenizer.separator_id:
            ids = np.append(ids, np.uint32(tokenizer.separator_id))
            mask = np.append(mask, False)
        return marked(ids, mask)


@dataclass(frozen=True)
class Chat:
    """How lines of JSON become conversations."""

    template: ChatTemplate
    separator: str

    def conversation(self, record: Any) -> Conversation | Unusable:
        """The conversation of what a line of JSON holds."""
        try:
            messages, prompt = _messages_of(record)
            check_messages(messages)
            return Conversation(self.template, messages, prompt, self.separator)
        except DataError as error:
            return Unusable("no_conversation", str(error))
        except UnicodeEncodeError:
            return NOT_UTF8


def _messages_of(record: Any) -> tuple[Any, int]:
    """The messages of a line, unchecked, and how many of them are a prompt."""
    if isinstance(record, dict) and "messages" in record:
        return record["messages"], 0
    if not isinstance(record, dict) or not {"prompt", "completion"} <= record.keys():
        raise DataError("it has neither messages nor prompt and completion")
    prompt, completion = (
        [{"role": role, "content": record[name]}]
        if isinstance(record[name], str)
        else record[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError("its prompt or completion is neither text nor messages")
    return [*prompt, *completion], len(prompt)

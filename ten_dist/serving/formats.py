"""Answers in the form of OpenAI's API: completions and chat, whole and streamed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from ten_dist.generation import Token
from ten_dist.serving.answer import Answer, Piece

Json = dict[str, Any]


class CompletionFormat:
    """`text_completion` objects.

    Args:
        model: name of the model.
        spell: the text of one token.
        logprobs: whether log-probabilities are wanted.
    """

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, spell: Callable[[int], str], logprobs: bool) -> None:
        self.model = model
        self._spell = spell
        self._logprobs = logprobs
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}

    def chunk(self, piece: Piece) -> Json:
        """What a stream says of a piece."""
        return self._object(self.chunk_kind, [self._part(piece, whole=False)])

    def first_chunks(self, choices: int) -> list[Json]:
        """What a stream begins with."""
        return []

    def whole(self, pieces: Sequence[Piece], answer: Answer) -> Json:
        """The whole answer, of all its pieces."""
        choices = [
            self._part(_joined(number, pieces), whole=True)
            for number in range(len(answer.choices))
        ]
        return {**self._object(self.kind, choices), "usage": usage(answer)}

    def last_chunk(self, answer: Answer) -> Json:
        """The numbers of tokens, as the end of a stream has them."""
        return {**self._object(self.chunk_kind, []), "usage": usage(answer)}

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _part(self, piece: Piece, whole: bool) -> Json:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._table(piece) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _table(self, piece: Piece) -> Json:
        texts = [self._spell(token.id) for token in piece.tokens]
        offsets, at = [], self._offsets.get(piece.choice, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[piece.choice] = at
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [
                {self._spell(i): logprob for i, logprob in token.alternatives}
                for token in piece.tokens
            ],
            "text_offset": offsets,
        }


class ChatFormat(CompletionFormat):
    """`chat.completion` objects."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self, choices: int) -> list[Json]:
        """The role of each choice."""
        role: Json = {"role": "assistant", "content": ""}
        return [
            self._object(self.chunk_kind, [self._choice(number, "delta", role, None)])
            for number in range(choices)
        ]

    def _part(self, piece: Piece, whole: bool) -> Json:
        said: Json = {"content": piece.text} if piece.text or whole else {}
        if whole:
            said = {"role": "assistant", **said, "refusal": None}
        part = self._choice(
            piece.choice, "message" if whole else "delta", said, piece.finish_reason
        )
        if self._logprobs:
            content = [self._entry(token) for token in piece.tokens]
            part["logprobs"] = {"content": content, "refusal": None}
        return part

    @staticmethod
    def _choice(number: int, name: str, said: Json, reason: str | None) -> Json:
        return {"index": number, name: said, "logprobs": None, "finish_reason": reason}

    def _entry(self, token: Token) -> Json:
        best = [self._spelled(i, logprob) for i, logprob in token.alternatives]
        return {**self._spelled(token.id, token.logprob), "top_logprobs": best}

    def _spelled(self, token: int, logprob: float | None) -> Json:
        text = self._spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(answer: Answer) -> Json:
    """Numbers of tokens."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _joined(choice: int, pieces: Sequence[Piece]) -> Piece:
    own = [piece for piece in pieces if piece.choice == choice]
    text = "".join(piece.text for piece in own)
    tokens = [token for piece in own for token in piece.tokens]
    return Piece(choice, text, tokens, own[-1].finish_reason)

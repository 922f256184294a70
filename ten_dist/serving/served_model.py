"""What is served: a network with its tokenizer and its chat template, and requests to it."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.export.exported_model import load_exported, read_exported_config
from ten_dist.generation import Request, Sampling
from ten_dist.run_folder import RunFolder
from ten_dist.serving.protocol import (
    MOST_CHOICES,
    BadRequest,
    ChatRequest,
    CompletionRequest,
)
from ten_dist.trained_model import TrainedModel, chat_template_of, tokenizer_of


class Task(NamedTuple):
    """What a request wants of the decoder."""

    requests: list[Request]
    """One for each choice."""
    stop: list[str]
    """Texts that end a choice."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model by the name under which clients ask for it."""

    name: str
    model: TrainedModel
    tokenizer: TextTokenizer
    template: ChatTemplate
    max_new_tokens: int
    """Most tokens that a request can ask for."""

    @classmethod
    def load(
        cls, path: Path, checkpoint: str | None, name: str | None, max_new_tokens: int
    ) -> ServedModel:
        """The model of a run, or of a folder that `ten-dist export` wrote.

        Args:
            path: the folder.
            checkpoint: of a run, as :meth:`RunFolder.chosen_checkpoint` takes it.
            name: under which clients ask for it; by default that of the folder.
            max_new_tokens: most tokens that a request can ask for.

        Raises:
            ConfigurationError: the folder holds no usable model.
        """
        folder, name = RunFolder(path), name or path.resolve().name
        if read_exported_config(path) is None:
            model = TrainedModel.load(folder, checkpoint)
            tokenizer = tokenizer_of(folder)
        elif checkpoint is None:
            model, tokenizer = load_exported(path)
        else:
            raise ConfigurationError(
                f"--checkpoint is of runs, and {path} holds an exported model"
            )
        template = chat_template_of(folder)
        return cls(name, model, tokenizer, template, max_new_tokens)

    def task(self, asked: CompletionRequest | ChatRequest) -> Task:
        """What a request wants of the decoder.

        Raises:
            BadRequest: it cannot be answered.
        """
        self.check_name(asked.model)
        if isinstance(asked, ChatRequest):
            return self._chat(asked)
        return self._completions(asked)

    def check_name(self, name: str) -> None:
        """Raise :class:`BadRequest` if clients call another model so."""
        if name != self.name:
            raise BadRequest(
                f"there is no model {name[:100]!r} here, only {self.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def _completions(self, asked: CompletionRequest) -> Task:
        """`n` requests for each prompt in turn."""
        prompts = [self._prompt(prompt) for prompt in asked.prompts]
        limit = self._limit("max_tokens", asked.max_tokens, default=16)
        requests = self._requests(asked, prompts, limit, asked.logprobs)
        return Task(requests, asked.stop_texts)

    def _chat(self, asked: ChatRequest) -> Task:
        """`n` requests for a turn of the assistant."""
        messages = [message.to_dict() for message in asked.messages]
        try:
            ids, _ = self.template.encode(
                messages, self.tokenizer, add_generation_prompt=True
            )
            end = self._turn_end
        except DataError as error:
            raise BadRequest(f"messages: {error}", "messages") from None
        asked_for = asked.max_completion_tokens or asked.max_tokens
        limit = self._limit("max_completion_tokens", asked_for, self.max_new_tokens)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs and not asked.logprobs:
            raise BadRequest("top_logprobs needs logprobs", "top_logprobs")
        requests = self._requests(asked, [ids.tolist()], limit, logprobs)
        # One token ends a turn as the separator does; several are looked for as text.
        if len(end) > 1:
            return Task(requests, [*asked.stop_texts, self.tokenizer.decode(end)])
        stop_ids = [self.tokenizer.separator_id, *end]
        ending = [dataclasses.replace(r, stop_ids=stop_ids) for r in requests]
        return Task(ending, asked.stop_texts)

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                ids = self.tokenizer.encode([prompt])[0].tolist()
            except (DataError, UnicodeEncodeError) as error:
                raise BadRequest(f"prompt: {error}", "prompt") from None
            # A document starts where another has ended.
            return ids or [self.tokenizer.separator_id]
        size = self.model.network.config.vocab_size
        for token in prompt:
            if not 0 <= token < size:
                raise BadRequest(
                    f"prompt: {token} is none of the {size} tokens", "prompt"
                )
        return prompt

    def _limit(self, name: str, value: int | None, default: int) -> int:
        if value is None:
            return min(default, self.max_new_tokens)
        if value > self.max_new_tokens:
            raise BadRequest(
                f"{name} is at most {self.max_new_tokens} here, not {value}", name
            )
        return value

    def _requests(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        max_new_tokens: int,
        logprobs: int | None,
    ) -> list[Request]:
        choices = len(prompts) * (asked.n or 1)
        if choices > MOST_CHOICES:
            raise BadRequest(
                f"prompts and n ask for {choices} continuations, and one request has at "
                f"most {MOST_CHOICES}",
                "n",
            )
        settings: dict[str, Any] = asked.sampling()
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        return [
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(**settings, seed=(seed + number) % 2**63),
                stop_ids=[self.tokenizer.separator_id],
                logprobs=logprobs,
            )
            for prompt in prompts
            for number in range(asked.n or 1)
        ]

    @functools.cached_property
    def _turn_end(self) -> list[int]:
        """What the assistant ends its turn with."""
        return self.template.turn_end(self.tokenizer).tolist()

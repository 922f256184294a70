"""Requests in the form of OpenAI's API, checked.

Fields that would change an answer and that this server does not have are refused by name, as
are unknown ones: a client that asks for what it does not get should know.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_CHOICES = 128
"""Continuations that one request can ask for, over all its prompts."""
MOST_LOGPROBS = 20
_MOST_FIELDS = 1000
"""Of one object. Faults are collected before one is told, and to collect a million takes
seconds in which nobody is served: hence this, and lists that end at their first fault."""

Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_SomePrompts = Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True)
]

_SETTINGS = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
# Fields that take more than one form.
_FORMS = {
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists, at "
    f"most {MOST_CHOICES} and none of the lists empty",
    "stop": "a text or a list of at most 16 texts that are not empty",
    "messages": "a list of objects with a role (system, developer, user or assistant) and "
    "a content that is text",
}


class BadRequest(Exception):
    """A request that is not answered, and why.

    Args:
        message: one sentence.
        parameter: the field that is wrong.
        status: of HTTP.
        code: a word for programs.
        retry_after: seconds after which it can be tried again.
    """

    def __init__(
        self,
        message: str,
        parameter: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.status = status
        self.code = code
        self.retry_after = retry_after


class StreamOptions(BaseModel):
    """What a stream has beside its tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stop_texts(self) -> list[str]:
        """Texts that end a continuation."""
        if isinstance(self.stop, str):
            return [self.stop] if self.stop else []
        return self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that are given, temperature as OpenAI's default."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "temperature": temperature,
            **{name: value for name, value in given.items() if value is not None},
        }


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], _SomePrompts]
        | Annotated[list[TokenIds], _SomePrompts]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # a list of ids is one prompt
        return self.prompt  # type: ignore[return-value]  # what is left are lists of prompts


class TextPart(BaseModel):
    """A part of what a message says."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: None = None

    def to_dict(self) -> dict[str, str]:
        """The message as templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ResponseFormat(BaseModel):
    """The form of an answer, of which there is one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


AnyRequest = TypeVar("AnyRequest", bound=_Request)


def parse(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    """A request of the bytes of its body.

    Raises:
        BadRequest: they are no such request.
    """
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_checked_object,
        )
    except UnicodeDecodeError:
        raise BadRequest("the body is not text in UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadRequest("the body is not a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _first_fault(error) from None


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_FIELDS:
        raise BadRequest(f"an object of the body has more than {_MOST_FIELDS} fields")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _first_fault(error: ValidationError) -> BadRequest:
    fault = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in fault["loc"]]
    field = place[0] if place else None
    if fault["type"] == "extra_forbidden":
        return BadRequest(f"there is no field {'.'.join(place)}", field)
    if fault["type"] == "missing":
        return BadRequest(f"{'.'.join(place)} is missing", field)
    if field in _FORMS:
        # The faults beside each of several forms would have to be told apart.
        return BadRequest(f"{field} is to be {_FORMS[field]}", field)
    reason = fault["msg"][:1].lower() + fault["msg"][1:]
    return BadRequest(f"{'.'.join(place)}: {reason}", field)

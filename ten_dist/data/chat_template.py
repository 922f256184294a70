"""Conversations as text and as tokens, by a template in the format of transformers.

A template is Jinja2: it gets ``messages``, ``add_generation_prompt``, ``bos_token`` and
``eos_token`` (the separator of the tokenizer, unless the template sets them), may call
``raise_exception``, and marks what the assistant says with ``{% generation %}``. It runs in
a sandbox. It is told no time of day: a conversation is to give the same tokens on any day.

What messages say is text, whatever it spells: only what the template itself writes becomes
special tokens. To tell the two apart, special tokens that messages spell are broken up with
characters that Unicode sets aside for use within a program; messages that hold such
characters are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ten_dist.data.chat_environment import compile_template
from ten_dist.data.chat_tokens import (
    EDGE,
    MARKS,
    RESERVED,
    Span,
    broken_up,
    encode_parts,
    may_join,
    split_marked,
)
from ten_dist.data.manifest import CHAT_TEMPLATE_NAME, Manifest
from ten_dist.data.tokenizer import SEPARATOR, TextTokenizer, read_set_file
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import read_user_text

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

Message = Mapping[str, Any]

# STX and ETX, of which every tokenizer of bytes has a token, and which no text has any use
# for: taken out of what messages say, so that nobody can write the end of a turn.
_DEFAULT = """\
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{- raise_exception("the role is to be system, user or assistant, not " ~ message.role) -}}
{%- endif -%}
{%- set said = message.content | replace("\\x02", "") | replace("\\x03", "") -%}
{{- "\\x02" ~ message.role ~ "\\n" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}{{- said ~ "\\x03" -}}{%- endgeneration -%}
{%- else -%}
{{- said ~ "\\x03" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "\\x02assistant\\n" -}}{%- endif -%}
"""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
_DEEPEST = 50
_ROLE = re.compile(r"[A-Za-z0-9_.-]+")


class ChatTemplate:
    """A chat template.

    Args:
        source: in Jinja2.
        name: what messages of errors call it.

    Raises:
        ConfigurationError: it does not parse, or Jinja2 is not installed.
    """

    def __init__(self, source: str, name: str = "the chat template") -> None:
        self.source = source
        self._name = name
        self._template = compile_template(source, name)
        self._marks_speech = bool(_GENERATION_TAG.search(source))

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, str]]:
        # What Jinja2 made of it cannot be sent to another process.
        return type(self), (self.source, self._name)

    @property
    def sha256(self) -> str:
        """Hash of the source in UTF-8, in hex."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    @classmethod
    def default(cls) -> ChatTemplate:
        """The own template, for any tokenizer that has tokens for control characters.

        A turn is STX, the role, a line end, what is said, ETX; what is said loses these
        two characters.
        """
        return cls(_DEFAULT, "the default chat template")

    @classmethod
    def read(cls, path: Path, what: str) -> ChatTemplate:
        """The template of a file: Jinja2, or a ``tokenizer_config.json`` that has one.

        Of the latter, special tokens that the template names are set within it.

        Args:
            path: the file.
            what: how messages begin.

        Raises:
            ConfigurationError: it cannot be read, has no template, or does not parse.
        """
        text = read_user_text(path, what, "give a file with a chat template")
        if path.suffix == ".json":
            source = _of_configuration(text)
            if source is None:
                raise ConfigurationError(
                    f"{what} has no chat_template: give a file with a chat template"
                )
            text = source
        return cls(text, what)

    @classmethod
    def beside(cls, tokenizer: Path) -> ChatTemplate | None:
        """The template in the folder of a tokenizer, or of its file; None without one.

        Raises:
            ConfigurationError: as :meth:`read`.
        """
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        path = folder / CHAT_TEMPLATE_NAME
        if path.exists():
            return cls.read(path, str(path))
        path = folder / TOKENIZER_CONFIG_NAME
        if not path.exists():
            return None
        source = _of_configuration(read_user_text(path, str(path)))
        return None if source is None else cls(source, str(path))

    def check(self, tokenizer: TextTokenizer) -> None:
        """Refuse a tokenizer of whose tokens none ends a turn: a model would never stop.

        Raises:
            ConfigurationError: it is so, or the template takes no conversation.
        """
        end = self.turn_end(tokenizer)
        if not tokenizer.decode(end.tolist()).strip(" ") or tokenizer.unknown_id in end:
            raise ConfigurationError(
                f"with this tokenizer nothing ends a turn of the assistant in {self._name}: "
                "give another with --chat_template"
            )

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        separator: str = SEPARATOR,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each with ``role`` and ``content``, and whatever else the template
                takes.
            add_generation_prompt: end with what an answer of the assistant begins with.
            separator: of the tokenizer.

        Raises:
            DataError: a message is malformed, or the template raises.
        """
        check_messages(messages)
        return MARKS.sub("", self._render(messages, add_generation_prompt, separator))

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: TextTokenizer,
        add_generation_prompt: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a conversation, and which of them the assistant says.

        Where no message spells a special token, the ids are those of ``apply_chat_template``
        of transformers.

        Returns:
            (ids, mask): uint32 [n]; bool [n], true from the beginning of what the
            assistant says to the end of its turn.

        Raises:
            DataError: as :meth:`render`; the template marks no generation and a
                conversation's text does not begin with that of its first messages; or it
                takes messages apart that spell a special token.
        """
        check_messages(messages)
        separator = tokenizer.separator
        text = self._render(messages, add_generation_prompt, separator)
        parts, said = split_marked(
            self._with_content_marked(text, messages, add_generation_prompt, tokenizer),
            tokenizer.special_ids,
        )
        if not self._marks_speech:
            said = self._said_by_prefixes(messages, MARKS.sub("", text), separator)
        return encode_parts(tokenizer, parts, said)

    def turn_end(self, tokenizer: TextTokenizer) -> np.ndarray:
        """The tokens that end a turn of the assistant: uint32, possibly none.

        Raises:
            DataError: as :meth:`encode`.
        """
        user = {"role": "user", "content": "a"}
        ids, mask = self.encode([user, {"role": "assistant", "content": ""}], tokenizer)
        said = ids[mask]
        # White space behind the end is nothing that an answer has to wait for.
        special = set(tokenizer.special_ids.values())
        ends = [at for at, token in enumerate(said.tolist()) if token in special]
        return said[: ends[0] + 1] if ends else said

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, separator: str
    ) -> str:
        """The text with the marks of what the assistant says."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=separator,
                eos_token=separator,
                tools=None,
                documents=None,
            )
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self._name} does not take it: {reason}") from None

    def _with_content_marked(
        self,
        text: str,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tokenizer: TextTokenizer,
    ) -> str:
        """A text as the template gave it, special tokens in what messages say broken up.

        Raises:
            DataError: the template takes apart what messages say, so that the marks would
                change its text, and that spells a special token or a part of one.
        """
        specials = tokenizer.special_ids
        marked = [_mark_strings(message, specials) for message in messages]
        try:
            found = self._render(marked, add_generation_prompt, tokenizer.separator)
        except DataError:
            found = ""
        if MARKS.sub("", found) == MARKS.sub("", text):
            return found
        for number, message in enumerate(messages, start=1):
            rest = {key: value for key, value in message.items() if key != "role"}
            if any(may_join(said, specials) for said in _strings(rest)):
                raise DataError(
                    f"message {number} spells a special token or a part of one, and "
                    f"{self._name} takes messages apart, so that the two cannot be told "
                    "apart: leave it out, or use another template"
                )
        return text

    def _said_by_prefixes(
        self, messages: Sequence[Message], text: str, separator: str
    ) -> list[Span]:
        """What the assistant says, of a template that does not mark it.

        It is what a text has more, with a turn of the assistant, than with what leads up
        to it.
        """
        said = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], True, separator) if number else ""
            after = self.render(messages[: number + 1], False, separator)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{self._name} has no {{% generation %}}, and what it makes of a "
                    f"conversation does not begin with what it makes of the first "
                    f"{number + 1} messages: mark in it what the assistant says with "
                    "{% generation %}"
                )
            said.append((len(before), len(after)))
        return said


def read_chat_template(manifest: Manifest) -> bytes | None:
    """The content of a set's ``chat_template.jinja``, checked against the manifest; None
    where it has none.

    Raises:
        DataError: it cannot be read, or is another one.
    """
    expected = manifest.chat_template_sha256
    if expected is None:
        return None
    return read_set_file(manifest.chat_template_path, "chat template", expected)


def check_messages(messages: Any) -> None:
    """Refuse what is no conversation.

    Raises:
        DataError: it is no list of messages, or empty; or a message has no plain role, or
            content that is not text, or is nested too deeply, or holds characters that
            Unicode sets aside.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise DataError("the messages are not a list")
    if not messages:
        raise DataError("the conversation is empty")
    for number, message in enumerate(messages, start=1):
        what = f"message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"{what} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise DataError(f"{what} has no role that is a word")
        if not isinstance(content, str):
            raise DataError(f"{what} has no content that is text")
        for text in _strings(message):
            if RESERVED.search(text):
                raise DataError(
                    f"{what} holds a character from U+FDD0 to U+FDEF, which Unicode sets "
                    "aside for use within programs"
                )


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text in a value of JSON."""
    if depth > _DEEPEST:
        raise DataError(f"a message is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, depth + 1)


def _mark_strings(message: Message, specials: Mapping[str, int]) -> dict[str, Any]:
    """A message whose texts spell no special token, nor do its content and what precedes
    or follows it."""

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return broken_up(value, specials)
        if isinstance(value, Mapping):
            return {marked(key): marked(inner) for key, inner in value.items()}
        return [marked(inner) for inner in value] if isinstance(value, list) else value

    # Roles are compared by the template, and their names are of its own vocabulary.
    changed = {
        key: value if key == "role" else marked(value) for key, value in message.items()
    }
    # Within the white space, which templates take away.
    content = changed["content"]
    if core := content.strip():
        changed["content"] = content.replace(core, f"{EDGE}{core}{EDGE}", 1)
    return changed


def _of_configuration(text: str) -> str | None:
    """The template in a ``tokenizer_config.json``, with its special tokens set; None
    without one."""
    try:
        content = json.loads(text)
        template = content["chat_template"]
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}["default"]
    except (ValueError, KeyError, TypeError):
        template = None
    if not isinstance(template, str):
        return None
    tokens = []
    for name in ("bos_token", "eos_token"):
        token = content.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and name in template:
            tokens.append(f"{{%- set {name} = {json.dumps(token)} -%}}\n")
    return "".join([*tokens, template])

"""Tokens of a text in which it is known what spells a special token and what only says so.

A text is given with marks: characters that Unicode sets aside for use within a program,
and that are no part of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer

from ten_dist.data.tokenizer import TextTokenizer, naming

SAID_START, SAID_STOP = "\ufdd0", "\ufdd1"
"""Marks of the beginning and end of what the assistant says."""
EDGE = "\ufdd2"
"""The mark at both ends of what a message says."""
BREAK = "\ufdd3"
"""The mark behind the first character of what would be a special token otherwise."""
MARKS = re.compile(f"[{SAID_START}{SAID_STOP}{EDGE}{BREAK}]")
RESERVED = re.compile("[\ufdd0-\ufdef]")
"""What marks are taken from."""
_ALIAS = "\ufdd4"

Span = tuple[int, int]
"""From which character of a text to before which."""
Part = tuple[str, bool]
"""A part of a text, and whether it is a special token."""


def broken_up(text: str, specials: Iterable[str]) -> str:
    """A text with :data:`BREAK` in every special token that it spells, overlapping or not."""
    return re.sub(rf"(?=(?:{_any(specials)}))(.)", rf"\1{BREAK}", text, flags=re.DOTALL)


def may_join(text: str, specials: Iterable[str]) -> bool:
    """Whether a text spells a special token, or might together with what surrounds it."""
    return any(
        token in text
        or any(text.endswith(token[:n]) or text.startswith(token[-n:]) for n in lengths)
        for token in specials
        for lengths in [range(1, len(token))]
    )


def split_marked(
    text: str, specials: Mapping[str, int]
) -> tuple[list[Part], list[Span]]:
    """Take the marks out of a text.

    Returns:
        (parts, said): the text in parts, and the characters of it that the assistant says.
    """
    parts: list[Part] = []
    said: list[Span] = []
    length = start = 0
    pattern = rf"(?:({_any(specials)})(?!{BREAK}))|{MARKS.pattern}"
    at = 0
    for found in re.finditer(pattern, text):
        before, token = text[at : found.start()], found[1]
        parts += [(before, False), *([(token, True)] if token else [])]
        length += len(before) + len(token or "")
        at = found.end()
        if found[0] == SAID_START:
            start = length
        elif found[0] == SAID_STOP:
            said.append((start, length))
    return [*parts, (text[at:], False)], said


def encode_parts(
    tokenizer: TextTokenizer, parts: Sequence[Part], said: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, as one: where parts meet they may be of one token.

    Args:
        tokenizer: whose special tokens the special parts are.
        parts: of the text; the others are text, whatever they spell.
        said: characters of the text that the mask is to count.

    Returns:
        (ids, mask): uint32 [n]; bool [n], true of a token with any such character.

    Raises:
        DataError: the tokenizer cannot encode it.
    """
    aliases, encoder = _with_aliases(tokenizer)
    counted = np.zeros(sum(len(text) for text, _ in parts), dtype=bool)
    for start, stop in said:
        counted[start:stop] = True
    texts, masks, specials, at = [], [], [], 0
    for text, special in parts:
        mask = counted[at : at + len(text)]
        at += len(text)
        if special:
            specials.append(tokenizer.special_ids[text])
            text = aliases[text]
            mask = np.full(len(text), mask.any())
        texts.append(text)
        masks.append(mask)
    joined = "".join(texts)
    with naming("the tokenizer cannot encode a conversation"):
        encoding = encoder.encode(joined, add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    aliased = codes == ord(_ALIAS)
    ids = np.array(encoding.ids, dtype=np.uint32)
    is_special = _any_within(aliased, offsets)
    ids[is_special] = specials
    mask = _any_within(np.concatenate(masks), offsets)
    return _spelled_out(tokenizer, ids, mask, is_special)


def _any_within(flags: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Whether any of the flags, [n] bool, is set within each span, [m, 2]: bool [m]."""
    before = np.concatenate([[0], np.cumsum(flags)])
    return before[spans[:, 1]] > before[spans[:, 0]]


def _spelled_out(
    tokenizer: TextTokenizer, ids: np.ndarray, mask: np.ndarray, is_special: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask with other tokens for the special ones that text has given, [n] each."""
    refused = set(tokenizer.special_ids.values()) - {tokenizer.unknown_id}
    from_text = np.isin(ids, list(refused)) & ~is_special
    if not from_text.any():
        return ids, mask
    pieces = [
        tokenizer.spelled_out(token) if other else np.array([token], np.uint32)
        for token, other in zip(ids.tolist(), from_text.tolist())
    ]
    return np.concatenate(pieces), np.repeat(mask, [piece.size for piece in pieces])


@functools.lru_cache(maxsize=8)
def _with_aliases(tokenizer: TextTokenizer) -> tuple[dict[str, str], Tokenizer]:
    """A name that no text holds for each special token, and a tokenizer that looks for
    these, and takes special tokens for text."""
    encoder = Tokenizer.from_str(tokenizer.to_json())
    encoder.encode_special_tokens = True
    aliases: dict[str, str] = {}
    for number, token in enumerate(tokenizer.spec["added_tokens"]):
        if token["content"] in tokenizer.special_ids:
            alias = f"{_ALIAS}{number}{_ALIAS}"
            takes = {side: token[side] for side in ("lstrip", "rstrip", "single_word")}
            encoder.add_tokens([AddedToken(alias, normalized=False, **takes)])
            aliases[token["content"]] = alias
    return aliases, encoder


def _any(tokens: Iterable[str]) -> str:
    """A pattern for any of some tokens, the longest that stands at a place."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return "|".join(map(re.escape, longest_first))

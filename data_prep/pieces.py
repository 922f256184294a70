"""Cutting long documents into pieces that are encoded one by one, where that is exact.

An encoding takes hundreds of bytes a character, so a long document is encoded in pieces.
Their tokens are those of the whole document only if no token, and nothing that the
tokenizer adds or takes away, reaches across a cut. That follows from what the tokenizer
says of itself, for the kinds below; a document is encoded whole with any other.

The pre-tokenizers of all of them begin a new word at a space that follows something else,
and their models look at one word at a time:

    bytes             cut anywhere: a token is a byte
    byte-level        GPT-2's pattern, or a known one of its successors, then BPE
    BERT              words between white space and punctuation, then WordPiece
    Metaspace         words that begin with a space, then Unigram or BPE
    Llama             BPE over the whole text, whose merges have spaces in front alone; the
                      space at a cut is left out, as each piece gets one in front
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ten_dist.data.tokenizer import TextTokenizer

PIECE_CHARACTERS = 1 << 17
"""Characters of a piece: at most, unless there is no place to cut."""

_SPACE = "\u2581"
"""What sentencepiece writes a space as."""
# Letters and numbers of which every version of Unicode says so may end a line; after other
# characters only a space surely begins a new word.
_AFTER_WORD = re.compile(r"[0-9A-Za-z\u4e00-\u9fa5\uac00-\ud7a3](?=[ \n])|\S(?= )")
# GPT-2's words end before any white space; Python's is Unicode's but for four more.
_AFTER_ANY = re.compile(r"\S(?=[^\S\x1c-\x1f])")
_BEFORE_SPACE = re.compile(rf"[^\s{_SPACE}](?= )")
_SEARCHED = 1 << 10
# Patterns that split a text as Llama 3 and Qwen 2 do. A word may begin with a space and
# holds none after that, and only what is neither letter nor number takes line ends with it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = tuple(
    rf"{_CONTRACTIONS}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}{_REST}"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
)


@dataclass(frozen=True)
class Cuts:
    """Where a text may be cut: behind each match of ``after``.

    ``drops_space`` leaves out the space that stands there.
    """

    after: re.Pattern[str]
    drops_space: bool = False


ANYWHERE = Cuts(re.compile(r"(?s:.)"))


def cuts_of(tokenizer: TextTokenizer) -> Cuts | None:
    """Where a text may be cut without changing its tokens; None where that is not known."""
    if tokenizer.in_bytes:
        return ANYWHERE
    spec = tokenizer.spec
    normalizer, model = spec["normalizer"], spec["model"]
    splitter = spec["pre_tokenizer"] or {"type": None}
    looked_for = [
        token
        for token in spec["added_tokens"]
        # Special ones are text, and so is the separator.
        if not token["special"] and token["content"] != tokenizer.separator
    ]
    # Where any is looked for, so are the special ones, whose characters it then passes over.
    if looked_for and not all(map(_stays_in_word, spec["added_tokens"])):
        return None
    kind = splitter["type"]
    if normalizer is None and model["type"] == "BPE":
        if kind == "ByteLevel" and splitter["use_regex"]:
            # A piece that begins with white space gets no space in front.
            return Cuts(_BEFORE_SPACE if splitter["add_prefix_space"] else _AFTER_ANY)
        if kind == "Sequence" and _splits_by_known_pattern(splitter["pretokenizers"]):
            return Cuts(_AFTER_WORD)
    if (
        kind == "BertPreTokenizer"
        and model["type"] == "WordPiece"
        and (normalizer is None or normalizer["type"] == "BertNormalizer")
    ):
        return Cuts(_BEFORE_SPACE)
    if (
        kind == "Metaspace"
        and splitter.get("split", True)
        and splitter["replacement"] == _SPACE
        and model["type"] in ("Unigram", "BPE")
        and normalizer is None
    ):
        return Cuts(_BEFORE_SPACE)
    if kind is None and not looked_for and _is_llama(normalizer, model):
        return Cuts(_BEFORE_SPACE, drops_space=True)
    return None


def _stays_in_word(token: dict[str, Any]) -> bool:
    """Whether an added token neither holds white space nor takes any with it."""
    strips = token["lstrip"] or token["rstrip"]
    return not strips and not re.search(r"\s", token["content"])


def _splits_by_known_pattern(parts: list[dict[str, Any]]) -> bool:
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, level = parts
    return (
        split["pattern"].get("Regex") in _KNOWN_PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and not level["use_regex"]
        and not level["add_prefix_space"]
    )


def _is_llama(normalizer: dict[str, Any] | None, model: dict[str, Any]) -> bool:
    """Whether a model sees spaces as a sign of its own, and merges none behind a letter."""
    if normalizer is None or normalizer["type"] != "Sequence" or model["type"] != "BPE":
        return False
    steps = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    return (
        normalizer["normalizers"] == steps
        and _SPACE in model["vocab"]
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not any(_SPACE in piece.lstrip(_SPACE) for piece in model["vocab"])
    )


def cut_pieces(
    chunks: Iterable[str], cuts: Cuts | None, limit: int | None = None
) -> Iterator[str]:
    """Join a text that comes in chunks, and cut it into pieces.

    Where the cuts are depends on the text alone, not on its chunks. A piece has at most
    ``limit`` characters, :data:`PIECE_CHARACTERS` by default, unless no cut is allowed
    before; then it ends at the next one that is.
    """
    limit = PIECE_CHARACTERS if limit is None else limit
    if cuts is None:
        yield "".join(chunks)
        return
    rest, waiting, size = "", [], 0
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        # Behind a long stretch without a cut, look again when as much has come.
        if size > max(limit, len(rest)):
            pieces, rest = _cut_off("".join([rest, *waiting]), cuts, limit)
            yield from pieces
            waiting, size = [], 0
    pieces, rest = _cut_off("".join([rest, *waiting]), cuts, limit)
    yield from pieces
    yield rest


def _cut_off(text: str, cuts: Cuts, limit: int) -> tuple[list[str], str]:
    """Pieces from the beginning of a text, and what is left of it."""
    pieces, start = [], 0
    # A cut needs to see the character behind it, and one more that is left to encode.
    while len(text) - start > limit + 1:
        cut = _last_cut(text, cuts, start, limit)
        if cut is None:
            break
        pieces.append(text[start:cut])
        start = cut + cuts.drops_space
    return pieces, text[start:]


def _last_cut(text: str, cuts: Cuts, start: int, limit: int) -> int | None:
    """The last place up to ``start + limit`` where a text may be cut, else the first."""
    end = start + limit
    searched = _SEARCHED
    while True:
        low = max(start, end - searched)
        # Its end is where the pattern may look ahead.
        found = [match.end() for match in cuts.after.finditer(text, low, end + 1)]
        found = [cut for cut in found if start < cut <= end]
        if found:
            return found[-1]
        if low == start:
            break
        searched *= 8
    match = cuts.after.search(text, end)
    if match is None or match.end() + 1 >= len(text):
        return None
    return match.end()

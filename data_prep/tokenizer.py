"""Training a byte-level BPE on the documents of a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ten_dist.data.tokenizer import SEPARATOR, byte_level

BYTES_VOCAB_SIZE = 257
_PART_CHARACTERS = 1 << 16
_WORD_CHARACTERS = 512
# Where a word ends and white space follows that both Python and the tokenizer call that.
_WORD_END = re.compile(r"\S(?=[^\S\x1c-\x1f])")
_LONG_RUN = re.compile(
    rf"(?<!\S)\S{{{_WORD_CHARACTERS + 1},}}|(?<!\s)\s{{{_WORD_CHARACTERS + 1},}}"
)


def train_tokenizer(texts: Iterable[Iterable[str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most ``vocab_size`` tokens, fewer if the texts give out.

    Each text comes in pieces; how it was cut makes no difference to the result. The 256
    bytes, so that any text is encoded without loss, and the separator are always in it.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (part for text in texts for part in _training_parts(text))
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def _training_parts(pieces: Iterable[str]) -> Iterator[str]:
    """Cut a text where that changes no word, and within its long runs of one kind.

    Training takes time quadratic in the length of a word: one file of encoded data, such
    as base64, or a ruled line would keep it busy for hours. And it collects many texts
    before it counts their words, so that long ones would take up memory.
    """
    rest = ""
    for piece in pieces:
        text = rest + piece
        start = 0
        for run in _LONG_RUN.finditer(text):
            first = run.start() + _WORD_CHARACTERS
            for cut in range(first, run.end(), _WORD_CHARACTERS):
                yield from _cut_at_words(text[start:cut])
                start = cut
        *parts, rest = _cut_at_words(text[start:])
        yield from parts
    yield rest


def _cut_at_words(text: str) -> Iterator[str]:
    """Cut between a word and white space, where no token ever reaches across."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        end = _WORD_END.search(text, start + _PART_CHARACTERS)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]

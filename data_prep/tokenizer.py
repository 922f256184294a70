"""The tokenizer of a token set: trained here, made of bytes, or the user's."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ten_dist.errors import ConfigurationError

SEPARATOR = "<|endoftext|>"
WELL_KNOWN_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BYTES_VOCAB_SIZE = 257
_PART_CHARACTERS = 1 << 16
_WORD_CHARACTERS = 512
# Where a word ends and white space follows that both Python and the tokenizer call that.
_WORD_END = re.compile(r"\S(?=[^\S\x1c-\x1f])")
_LONG_RUN = re.compile(
    rf"(?<!\S)\S{{{_WORD_CHARACTERS + 1},}}|(?<!\s)\s{{{_WORD_CHARACTERS + 1},}}"
)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a size that a byte-level BPE cannot have.

    Raises:
        ConfigurationError: ``vocab_size`` has no room for the bytes and the separator.
    """
    if vocab_size < BYTES_VOCAB_SIZE:
        raise ConfigurationError(
            f"--vocab_size must be at least {BYTES_VOCAB_SIZE} (256 bytes and the "
            f"separator), not {vocab_size}"
        )


def train_tokenizer(texts: Iterable[Iterable[str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most ``vocab_size`` tokens, fewer if the texts give out.

    Each text comes in pieces; how it was cut makes no difference to the result.

    It holds all 256 bytes, so it encodes any text without loss, and :data:`SEPARATOR`.

    Raises:
        ConfigurationError: ``vocab_size`` has no room for the bytes and the separator.
    """
    check_vocab_size(vocab_size)
    tokenizer = _byte_level(models.BPE())
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


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, id = byte, and the separator, 256."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet shows a printable byte as itself and the others, in order,
    # as the characters from 256 up.
    shown = {ord(character): character for character in alphabet}
    others = iter(sorted(character for code, character in shown.items() if code > 255))
    vocabulary = {shown.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([SEPARATOR])
    return tokenizer


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: what an embedding needs, gaps in the ids too."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def find_separator(tokenizer: Tokenizer, wanted: str | None = None) -> tuple[str, int]:
    """The token, and its id, that ends each document.

    Raises:
        ConfigurationError: the tokenizer lacks ``wanted``, or, where that is None, all
            of the well-known ones.
    """
    for token in [wanted] if wanted is not None else WELL_KNOWN_SEPARATORS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token, token_id
    if wanted is not None:
        raise ConfigurationError(f"--separator {wanted!r} is no token of the tokenizer")
    raise ConfigurationError(
        f"the tokenizer has none of {' '.join(WELL_KNOWN_SEPARATORS)} to separate "
        "documents: name the token to use with --separator"
    )


class Encoder:
    """Turns text into token ids; ``separator``, 1-D uint32, is what ends a document."""

    def __init__(self, tokenizer_json: str, separator: str | None) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A document that spells out the separator contains text, not the end of itself.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        separator_id = find_separator(self._tokenizer, separator)[1]
        self.separator = np.array([separator_id], dtype=np.uint32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text: 1-D uint32. Several threads may call it at once."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # By way of an array: numpy takes three times as long over a list.
        return [np.asarray(array("I", encoding.ids)) for encoding in encodings]


class ByteEncoder(Encoder):
    """The encoder of :func:`byte_tokenizer`, whose ids are the bytes of the text.

    The library gives the same, but splits the text into words and makes a token of each
    byte: that takes a hundred times as long, and hundreds of bytes of memory a byte.
    """

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As :meth:`Encoder.encode`."""
        contents = (text.encode("utf-8") for text in texts)
        return [
            np.frombuffer(content, dtype=np.uint8).astype(np.uint32)
            for content in contents
        ]


def make_encoder(tokenizer_json: str, separator: str | None) -> Encoder:
    """The fastest encoder of a tokenizer.

    Raises:
        ConfigurationError: as :func:`find_separator`.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # As the library writes it: the same tokenizer may come laid out in another way.
    in_bytes = tokenizer.to_str() == byte_tokenizer().to_str()
    return (ByteEncoder if in_bytes else Encoder)(tokenizer_json, separator)

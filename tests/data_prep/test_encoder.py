"""The byte tokenizer's own encoder gives what the library gives."""

from __future__ import annotations

import json
import random

import numpy as np
from tokenizers import Tokenizer

from data_prep.tokenizer import (
    SEPARATOR,
    ByteEncoder,
    Encoder,
    byte_tokenizer,
    make_encoder,
    train_tokenizer,
)

SURROGATES = range(0xD800, 0xE000)


def hard_texts():
    """What a tokenizer might treat in a way of its own, alone and together."""
    # Every character of one or two bytes, and some of every block and length beyond.
    codes = [*range(0x3000), *range(0x3000, 0x110000, 61), 0xFEFF, 0xFFFF, 0x10FFFF]
    characters = [chr(code) for code in codes if code not in SURROGATES]
    draw = random.Random(0)
    parts = [SEPARATOR, "<|", "endoftext", "|>", " ", "\n", "\r\n", "\0", "'s", "12"]
    parts += ["e\u0301", "\u00e9", "\u200d", "\U0001f469\u200d\U0001f52c", "模型"]
    yield ""
    yield from parts
    yield "".join(characters)
    for _ in range(20):
        yield "".join(draw.choices(parts, k=50))
        yield "".join(draw.choices(characters, k=200))


def test_the_ids_are_those_of_the_library():
    text = byte_tokenizer().to_str(pretty=True)
    encoder, library = make_encoder(text, None), Encoder(text, None)
    assert type(encoder) is ByteEncoder
    assert encoder.separator.tolist() == library.separator.tolist() == [256]
    assert encoder.encode([]) == library.encode([]) == []
    texts = list(hard_texts())
    for own, other, one in zip(
        encoder.encode(texts), library.encode(texts), texts, strict=True
    ):
        np.testing.assert_array_equal(own, other, err_msg=repr(one[:100]))
        assert own.dtype == other.dtype == np.uint32


def test_it_is_taken_for_the_byte_tokenizer_alone():
    text = byte_tokenizer().to_str()
    # However its file is laid out, and whatever ends a document.
    assert type(make_encoder(json.dumps(json.loads(text)), None)) is ByteEncoder
    assert make_encoder(text, "a").separator.tolist() == [ord("a")]
    other = Tokenizer.from_str(text)
    other.add_tokens(["word"])
    trained = train_tokenizer([["a text of few words"]], 257)
    for tokenizer in (other, trained):
        assert type(make_encoder(tokenizer.to_str(), None)) is Encoder

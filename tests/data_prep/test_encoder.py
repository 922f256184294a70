"""The byte tokenizer's own encoding gives what the library gives."""

from __future__ import annotations

import json
import random

import numpy as np
from tokenizers import Tokenizer

from data_prep.tokenizer import train_tokenizer
from ten_dist.data.tokenizer import SEPARATOR, TextTokenizer, byte_tokenizer

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
    tokenizer, library = (
        TextTokenizer(byte_tokenizer().to_str(pretty=True)),
        byte_tokenizer(),
    )
    library.encode_special_tokens = True
    assert tokenizer.in_bytes and tokenizer.separator_id == 256
    assert tokenizer.encode([]) == []
    texts = list(hard_texts())
    for own, text in zip(tokenizer.encode(texts), texts, strict=True):
        np.testing.assert_array_equal(own, library.encode(text).ids, repr(text[:100]))
        assert own.dtype == np.uint32


def test_it_is_taken_for_the_byte_tokenizer_alone():
    text = byte_tokenizer().to_str()
    # However its file is laid out.
    assert TextTokenizer(json.dumps(json.loads(text))).in_bytes
    other = Tokenizer.from_str(text)
    other.add_tokens(["word"])
    trained = train_tokenizer([["a text of few words"]], 257)
    for tokenizer in (other, trained):
        assert not TextTokenizer(tokenizer.to_str()).in_bytes

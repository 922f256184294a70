"""Text as it comes: the same text as in one piece, and nothing that has to be taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ten_dist.data.tokenizer import byte_tokenizer
from ten_dist.generation.text_stream import TextStream

BYTES = byte_tokenizer()


def decode_bytes(ids):
    return BYTES.decode(list(ids), skip_special_tokens=False)


def streamed(ids, prompt=(), stop=(), decode=decode_bytes):
    stream = TextStream(decode, prompt, stop)
    return [*(stream.push(i) for i in ids), stream.finish()]


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    parts = streamed("aé€😀b".encode())
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    ids = bytes([0xFF, 0xFF, 0xFF, 0xFF, 0xE2, 0x82, 0xAC, 0xE2]) + b"!"
    parts = streamed(ids)
    assert "".join(parts) == "�" * 4 + "€" + "�!"
    assert parts[3] == "�"


def test_a_continuation_can_finish_a_character_of_the_prompt():
    euro = "€".encode()
    assert "".join(streamed(euro[2:], prompt=b"a" + euro[:2])).endswith("€")


@given(st.binary(max_size=40), st.binary(max_size=12))
def test_the_parts_are_the_whole(content, prompt):
    whole = decode_bytes(content)
    assert "".join(streamed(content)) == whole
    # After a prompt that ends with whole characters.
    prompt = prompt.decode("utf-8", errors="ignore").encode()
    assert "".join(streamed(content, prompt)) == whole


def test_spaces_of_words_are_those_of_the_whole_text():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["one two three two one two"], trainer)
    prompt, ids = (tokenizer.encode(t).ids for t in ("one two", "three one"))
    assert "".join(streamed(ids, prompt, decode=tokenizer.decode)) == " three one"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one. two. three", [". "], "one"),
        ("a END b", ["END"], "a "),
        ("a EN b", ["END"], "a EN b"),
        ("a EN", ["END"], "a EN"),
        ("aab", ["ab"], "a"),
        ("abcd", ["cd", "bcd"], "a"),
        ("x€y", ["€"], "x"),
        ("plain", ["", "z"], "plain"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stop, wanted):
    stream = TextStream(decode_bytes, stop=stop)
    given_out = ""
    for token in text.encode():
        given_out += stream.push(token)
        assert wanted.startswith(given_out)
    given_out += stream.finish()
    assert given_out == wanted
    assert stream.stopped == (wanted != text)

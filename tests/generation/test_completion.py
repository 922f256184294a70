"""Continuations as text: what comes in pieces is what a whole decoding gives."""

import pytest

from ten_dist.generation import Decoder, Request, Sampling
from ten_dist.generation.completion import Completion
from tests.model.test_network import make_model


def letters(ids):
    return "".join(chr(ord("a") + token) for token in ids)


def run(decoder, *completions):
    pieces = {completion: [] for completion in completions}
    while len(decoder):
        decoder.step()
        for completion in completions:
            pieces[completion].append(completion.take())
    return ["".join(parts) for parts in pieces.values()]


def request(**options):
    defaults = {"prompt": [1, 2], "max_new_tokens": 20, "sampling": Sampling(seed=1)}
    return Request(**{**defaults, **options})


@pytest.fixture(scope="module")
def whole():
    decoder = Decoder(make_model())
    result = decoder.add(request())
    while len(decoder):
        decoder.step()
    return result.ids


def test_text_comes_as_its_tokens_do(whole):
    decoder = Decoder(make_model())
    completion = Completion(decoder, request(), letters)
    given_out = ""
    for number in range(1, 21):
        decoder.step()
        given_out += completion.take()
        assert given_out == letters(whole[:number])
    assert completion.finish_reason == "length"
    assert completion.take() == ""


def test_a_stop_string_ends_one_and_not_those_beside_it(whole):
    stop = letters(whole[6:9])
    assert letters(whole).index(stop) == 6
    decoder = Decoder(make_model())
    stopped = Completion(decoder, request(), letters, [stop])
    beside = Completion(decoder, request(), letters)
    assert run(decoder, stopped, beside) == [letters(whole[:6]), letters(whole)]
    assert stopped.finish_reason == "stop" and len(stopped.generated.ids) == 9
    assert beside.finish_reason == "length"


def test_a_stop_token_is_no_part_of_the_text(whole):
    end = whole[5]
    decoder = Decoder(make_model())
    completion = Completion(decoder, request(stop_ids=[end]), letters)
    assert run(decoder, completion) == [letters(whole[: whole.index(end)])]
    assert completion.finish_reason == "stop"

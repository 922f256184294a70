"""Many requests, a few at once: what is held at a time, and the order of what comes out."""

from ten_dist.generation import Decoder, Request, Sampling, generate
from ten_dist.inference.in_order import completed_in_order
from ten_dist.inference.shared_prompts import SharedPrompts
from tests.model.test_network import make_model


def letters(ids):
    return "".join(chr(ord("a") + token) for token in ids)


def make_request(prompt, steps, seed=0):
    sampling = Sampling(seed=seed)
    return Request(prompt=prompt, max_new_tokens=steps, sampling=sampling)


def completed(decoder, requests, batch_size):
    """Item and text of each completion, in the order that they come."""
    texts, text = [], ""
    for piece in completed_in_order(decoder, requests, letters, (), batch_size):
        text += piece.text
        if piece.last:
            texts.append((piece.item, text))
            text = ""
    return texts


def test_requests_are_read_when_there_is_room_and_come_out_in_order():
    model, most, begun, ended = make_model(), 3, [], []
    lengths = [90, *(n % 7 + 1 for n in range(199))]

    def requests():
        for number, length in enumerate(lengths):
            begun.append(number)
            # The first one takes long; those that wait for it are not without number.
            assert len(begun) - len(ended) <= 16 * most
            yield number, make_request([number % 9], length)

    decoder = Decoder(model)
    steps = completed_in_order(decoder, requests(), letters, (), most)
    for piece in steps:
        assert len(decoder) <= most
        if piece.last:
            ended.append(piece.item)
    assert ended == list(range(200))


def test_completions_are_those_of_each_alone():
    model = make_model((1, 2))
    prompts = [[n, 3, n] for n in range(1, 8)]
    requests = [(n, make_request(prompt, 4 + n)) for n, prompt in enumerate(prompts)]
    wanted = [
        (n, letters(generate(model, [prompt], 4 + n)[0]))
        for n, prompt in enumerate(prompts)
    ]
    assert completed(Decoder(model), requests, batch_size=3) == wanted


def test_samples_read_their_prompt_once():
    model = make_model((1, 2))
    shared, read = SharedPrompts(capacity=2), []
    model.embedding.register_forward_hook(
        lambda module, arguments, output: read.append(arguments[0].numel())
    )

    def requests():
        for prompt in ([1] * 30, [2] * 40):
            shared.expect(prompt)
            for seed in range(5):
                yield seed, make_request(prompt, 3 + seed, seed)

    texts = completed(Decoder(model, cache=shared), requests(), batch_size=2)
    assert [tokens for tokens in read if tokens > 2] == [29, 39]
    wanted = [
        letters(generate(model, [prompt], 3 + seed, Sampling(seed=seed))[0])
        for prompt in ([1] * 30, [2] * 40)
        for seed in range(5)
    ]
    assert [text for _, text in texts] == wanted

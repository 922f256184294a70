"""Decoding: what is drawn, that rows do not disturb each other, and what a token costs."""

import dataclasses

import pytest
import torch

from ten_dist.generation import Decoder, Request, Sampling, generate
from ten_dist.generation.sampling import likely_tokens
from ten_dist.model.state import state_bytes
from tests.model.test_network import VOCAB, make_model, random_ids

GREEDY = Sampling(temperature=0)
MODELS = {
    "ten": {},
    "hten": {"scales": (1, 2, 4)},
    "everything": {
        "scales": (1, 4),
        "short_convolution": 3,
        "gate": "state",
        "document_separator_id": 7,
    },
    "levels": {"levels": (4, 16), "short_convolution": 3},
    "matrix": {"state_dim": 3, "matrix_layers": (0,), "scales": (1, 2)},
    "attention": {"mixer": "attention"},
}
PROMPTS = [[5], [1, 2, 3], list(range(8, 30)), [7, 9], list(range(13))]


def greedily(model, prompt, steps):
    """The tokens that whole sequences give, read anew for each."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_unequal_length_give_what_each_alone_gives(name):
    model = make_model(**MODELS[name])
    together = generate(model, PROMPTS, 12, GREEDY)
    assert together == [greedily(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("name", MODELS)
def test_sequences_come_and_go_at_any_step(name):
    model = make_model(**MODELS[name])
    decoder, results = Decoder(model), []
    for number, prompt in enumerate(PROMPTS):
        request = Request(prompt=prompt, max_new_tokens=3 + 2 * number, sampling=GREEDY)
        results.append(decoder.add(request))
        decoder.step()
    cancelled = decoder.add(Request(prompt=[3, 4], max_new_tokens=50))
    decoder.step()
    decoder.cancel(cancelled)
    assert cancelled.finish_reason == "cancelled"
    while len(decoder):
        assert cancelled not in decoder.step()
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert result.ids == greedily(model, prompt, 3 + 2 * number)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_goes_on_from_its_state(name):
    model = make_model(**MODELS[name])
    decoder = Decoder(model)
    first = decoder.add(Request(prompt=PROMPTS[2], max_new_tokens=5, sampling=GREEDY))
    beside = decoder.add(Request(prompt=PROMPTS[1], max_new_tokens=9, sampling=GREEDY))
    while first.finish_reason is None:
        decoder.step()
    more = [first.ids[-1], 11, 12, 13]
    second = decoder.add(
        Request(prompt=more, max_new_tokens=6, sampling=GREEDY, state=first.state)
    )
    while len(decoder):
        decoder.step()
    whole = PROMPTS[2] + first.ids + more[1:]
    assert second.ids == greedily(model, whole, 6)
    assert beside.ids == greedily(model, PROMPTS[1], 9)


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(monkeypatch):
    model = make_model((1, 2, 4))
    monkeypatch.setattr("ten_dist.generation.decoder.PROMPT_PIECE", 7)
    decoder, long = Decoder(model), random_ids(batch=1, steps=50)[0].tolist()
    running = decoder.add(Request(prompt=[1], max_new_tokens=30, sampling=GREEDY))
    waiting = decoder.add(Request(prompt=long, max_new_tokens=5, sampling=GREEDY))
    for _ in range(4):
        assert decoder.step() == [running]
    while len(decoder):
        decoder.step()
    assert waiting.ids == greedily(model, long, 5)
    assert running.ids == greedily(model, [1], 30)


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
def test_state_does_not_grow_with_the_sequence(scales):
    model = make_model(scales)
    decoder = Decoder(model)
    sizes = set()
    for steps in (16, 160):
        prompt = random_ids(batch=1, steps=steps)[0].tolist()
        result = decoder.add(Request(prompt=prompt, max_new_tokens=1))
        decoder.step()
        sizes.add(state_bytes(result.state))
    assert len(sizes) == 1 and sizes.pop() > 0


def test_each_generated_token_is_one_step_of_all_rows():
    model = make_model()
    shapes = []
    decoder = Decoder(model)
    handle = model.embedding.register_forward_hook(
        lambda module, arguments, output: shapes.append(tuple(arguments[0].shape))
    )
    for prompt in ([1, 2, 3, 4], [5, 6]):
        decoder.add(Request(prompt=prompt, max_new_tokens=3, sampling=GREEDY))
    while len(decoder):
        decoder.step()
    handle.remove()
    assert shapes == [(1, 3), (1, 1), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("options", [{"scales": (1, 2)}, {"levels": (4, 16)}])
def test_prompts_that_wait_together_are_read_once(options):
    class Cache(dict):
        def longest_prefix(self, tokens):
            state = self.get(tuple(tokens))
            return (0, None) if state is None else (len(tokens), state)

        def put(self, tokens, state):
            self[tuple(tokens)] = state

    model = make_model(**options)
    decoder, prompt = Decoder(model, cache=Cache()), PROMPTS[2]
    read = []
    handle = model.embedding.register_forward_hook(
        lambda module, arguments, output: read.append(arguments[0].numel())
    )
    results = [
        decoder.add(Request(prompt=prompt, max_new_tokens=4, sampling=GREEDY))
        for _ in range(3)
    ]
    while len(decoder):
        decoder.step()
    handle.remove()
    assert read == [len(prompt) - 1, 3, 3, 3, 3]
    assert {tuple(result.ids) for result in results} == {
        tuple(greedily(model, prompt, 4))
    }


def test_a_seed_decides_what_a_row_draws_whatever_is_beside_it():
    model = make_model()
    prompt, others = [1, 2, 3], [[4], [5, 6]]
    (alone,) = generate(model, [prompt], 20, Sampling(seed=3))
    again, *_ = generate(model, [prompt, *others], 20, Sampling(seed=3))
    (other,) = generate(model, [prompt], 20, Sampling(seed=4))
    assert alone == again != other


def test_tokens_are_drawn_as_often_as_they_are_likely():
    model = make_model()
    with torch.no_grad():
        wanted = (model(torch.tensor([[1]]))[0, -1] / 0.7).softmax(dim=0)
    drawn = generate(model, [[1]] * 4000, 1, Sampling(temperature=0.7))
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCAB)
    deviation = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((counts / 4000 - wanted).abs() < 5 * deviation + 1e-3).all()


@pytest.mark.parametrize(
    "option", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}]
)
def test_narrow_settings_leave_the_likeliest_token(option):
    model = make_model()
    sampling = dataclasses.replace(Sampling(temperature=5.0), **option)
    assert generate(model, PROMPTS, 6, sampling) == generate(model, PROMPTS, 6, GREEDY)


def test_min_p_leaves_tokens_near_the_likeliest():
    model = make_model()
    with torch.no_grad():
        probabilities = model(torch.tensor([[1]]))[0, -1].softmax(dim=0)
    least = probabilities.sort(descending=True).values[9] / probabilities.max()
    sampling = Sampling(temperature=1.0, min_p=least.item() * 0.999)
    drawn = {ids[0] for ids in generate(model, [[1]] * 2000, 1, sampling)}
    assert drawn == set(probabilities.topk(10).indices.tolist())


@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_top_p_leaves_the_fewest_tokens_that_reach_it(spread):
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    kept = likely_tokens(logits, Sampling(top_p=0.9)).isfinite()
    ordered = logits.double().softmax(dim=0).sort(descending=True)
    fewest = int((ordered.values.cumsum(dim=0) < 0.9).sum()) + 1
    assert kept.sum() == fewest
    assert kept[ordered.indices[:fewest]].all()


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1e6},
        {"presence_penalty": 1e6},
        {"frequency_penalty": 1e6},
    ],
)
def test_penalties_keep_tokens_from_coming_again(penalty):
    model = make_model()
    (ids,) = generate(model, [[1, 2]], 30, Sampling(temperature=0, **penalty))
    assert len(set(ids)) == 30
    # Tokens of the prompt are repetitions as well, and no part of the continuation.
    assert ("repetition_penalty" in penalty) <= ({1, 2}.isdisjoint(ids))


def test_generation_ends_at_a_stop_token():
    model = make_model()
    (whole,) = generate(model, [[1, 2]], 10, GREEDY)
    (ids,) = generate(model, [[1, 2]], 10, GREEDY, stop_ids=[whole[3]])
    assert ids == whole[: whole.index(whole[3]) + 1]


def test_log_probabilities_are_those_of_the_model():
    model = make_model()
    decoder = Decoder(model)
    request = Request(
        prompt=[1, 2], max_new_tokens=4, sampling=Sampling(top_k=3), logprobs=2
    )
    result = decoder.add(request)
    while len(decoder):
        decoder.step()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, *result.ids]]))
    logprobs = logits[0, 1:-1].log_softmax(dim=-1)
    for token, row in zip(result.tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-5)
        best = row.topk(2)
        assert [i for i, _ in token.alternatives] == best.indices.tolist()


def test_a_frozen_network_computes_the_same():
    ids = random_ids()
    for options in MODELS.values():
        model = make_model(**options)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = model(ids)
            model.freeze(torch.bfloat16)
            assert torch.equal(model(ids), wanted)


@pytest.mark.parametrize(
    ("request_options", "message"),
    [
        ({"prompt": [], "max_new_tokens": 1}, "at least one token"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_requests_without_sense_are_refused(request_options, message):
    with pytest.raises(ValueError, match=message):
        Request(**request_options)

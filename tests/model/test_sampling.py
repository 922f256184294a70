"""Generation: what is drawn, when it stops, and that its cost does not grow."""

import pytest
import torch

from tests.model.test_network import make_model, random_ids


def state_size(state):
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, (tuple, list)):
        return sum(state_size(part) for part in state)
    return 0


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
@torch.no_grad()
def test_greedy_continuation_is_that_of_whole_sequences(scales):
    model = make_model(scales)
    prompt = random_ids(steps=9)
    generated = model.generate(prompt, max_new_tokens=12, temperature=0)
    ids = prompt
    for _ in range(12):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model = make_model((1, 2, 4))
    prompt = random_ids(steps=50)
    whole = model.generate(prompt, max_new_tokens=5, temperature=0)
    monkeypatch.setattr("ten_dist.model.sampling.PROMPT_PIECE", 7)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, temperature=0), whole)


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
@torch.no_grad()
def test_state_does_not_grow_with_the_sequence(scales):
    model = make_model(scales)
    _, short = model(random_ids(steps=16), return_state=True)
    _, long = model(random_ids(steps=160), return_state=True)
    assert state_size(short) == state_size(long)


def test_each_generated_token_is_one_step():
    model = make_model()
    lengths = []
    handle = model.embedding.register_forward_hook(
        lambda module, arguments, output: lengths.append(arguments[0].shape[1])
    )
    model.generate(random_ids(steps=9), max_new_tokens=5)
    handle.remove()
    assert lengths == [9, 1, 1, 1, 1]


def test_sampling_is_a_function_of_its_generator():
    model = make_model()
    runs = [
        model.generate(
            random_ids(), 8, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_top_k_and_top_p_leave_only_the_likeliest():
    model = make_model()
    greedy = model.generate(random_ids(), 6, temperature=0)
    assert torch.equal(model.generate(random_ids(), 6, top_k=1), greedy)
    assert torch.equal(model.generate(random_ids(), 6, top_p=1e-9), greedy)


def test_generation_ends_at_the_stop_token():
    model = make_model()
    prompt = random_ids(batch=1)
    first = int(model.generate(prompt, 1, temperature=0)[0, -1])
    stopped = model.generate(prompt, 20, temperature=0, stop_id=first)
    assert stopped.shape[1] == prompt.shape[1] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(random_ids(), 1, **options)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        make_model().generate(torch.empty(1, 0, dtype=torch.int64), 1)

"""States by what was read: the longest beginning is found, and memory stays as it is."""

import pytest
import torch

from ten_dist.generation import Decoder, Request
from ten_dist.model.state import state_bytes
from ten_dist.serving.prefix_cache import PrefixCache
from tests.model.test_network import make_model


def state_after(model, tokens):
    _, state = model(torch.tensor([tokens]), return_state=True)
    return state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scales": (1, 2, 4)},
        {"levels": (4, 16)},
        {"state_dim": 3, "matrix_layers": (1,)},
    ],
)
def test_of_more_states_than_there_is_room_for_the_oldest_goes(options):
    model = make_model(**options)
    empty = Decoder(model).empty_state()
    cache = PrefixCache(3 * (state_bytes(empty) + 1000))
    prompts = [[number, 7, 7] for number in range(50)]
    room = 0
    for prompt in prompts:
        cache.put(prompt, state_after(model, prompt))
        assert cache.longest_prefix([*prompt, 1])[0] == 3
        assert cache.bytes >= room
        room = cache.bytes
    assert 0 < room <= 3 * (state_bytes(empty) + 1000)
    assert cache.longest_prefix(prompts[0]) == (0, None)
    length, state = cache.longest_prefix([49, 7, 7, 3])
    with torch.no_grad():
        after, _ = model(torch.tensor([[3]]), state=state, return_state=True)
        whole = model(torch.tensor([[49, 7, 7, 3]]))[:, -1:]
    assert length == 3
    torch.testing.assert_close(after, whole)


def test_what_was_let_go_is_known_as_well():
    model = make_model()
    cache = PrefixCache(10**6)
    decoder = Decoder(model, cache=cache)
    going = decoder.add(Request(prompt=[1, 2, 3], max_new_tokens=100))
    decoder.step()
    decoder.cancel(going)
    assert cache.longest_prefix([1, 2, 3, 4])[0] == 3

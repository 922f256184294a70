"""The transformer that the eigenstate network is compared with."""

import pytest
import torch

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.errors import ConfigurationError
from tests.model.test_network import VOCAB, make_model, random_ids


def plain_attention(mixer, u):
    """Softmax attention written down again, rotary embedding as complex rotation."""
    heads, dim = mixer.num_heads, u.shape[2]
    query, key, value = (
        (u @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight in mixer.input_weight.split(dim)
    )
    half = dim // heads // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(u.shape[1])[:, None] * frequency)
    query, key = (
        torch.complex(x[..., :half], x[..., half:]) * turn for x in (query, key)
    )
    scores = (query @ key.mH).real / (2 * half) ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(-2) @ mixer.output_weight.T


@torch.no_grad()
def test_attention_equals_a_plain_implementation():
    mixer = make_model(mixer="attention").blocks[0].mixer.double()
    u = torch.randn(2, 17, 24, dtype=torch.float64)
    # The rotation is computed in float32.
    torch.testing.assert_close(
        mixer(u)[0], plain_attention(mixer, u), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_attention_is_causal_and_streams():
    model = make_model(mixer="attention")
    ids = random_ids()
    logits = model(ids)
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % VOCAB
    torch.testing.assert_close(model(changed)[:, :30], logits[:, :30])
    state, outputs = None, []
    for piece in ids.split([3, 1, 20, 27], dim=1):
        piece_logits, state = model(piece, state=state, return_state=True)
        outputs.append(piece_logits)
    torch.testing.assert_close(torch.cat(outputs, 1), logits, rtol=0, atol=1e-5)


def test_any_preset_has_a_transformer_beside_it():
    config = TemporalEigenstateConfig.preset("xlarge", mixer="attention")
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(config)
    matrices = 12 * config.dim**2 * config.n_layers + config.vocab_size * config.dim
    assert abs(model.num_parameters() / matrices - 1) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 7}, "dim 320 does not divide over num_heads 7"),
        ({"hten_scales": (1, 2)}, "hten_scales has no effect with mixer attention"),
        ({"gate": "state"}, "gate has no effect with mixer attention"),
    ],
)
def test_impossible_transformers_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TemporalEigenstateConfig.preset("nano", mixer="attention", **options)

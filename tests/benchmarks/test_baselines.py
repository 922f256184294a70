"""The baselines compute their papers' recurrences, look at no future, and learn."""

import pytest
import torch

from benchmarks.baselines import Baseline, BaselineConfig
from benchmarks.baselines.matrix_states import CHUNK, chunked_states
from benchmarks.baselines.min_gru import linear_scan

CONFIGS = {
    "attention": BaselineConfig(
        mixer="attention", dim=16, n_layers=2, ffn_dim=24, num_heads=2, convolution=4
    ),
    "min_gru": BaselineConfig(
        mixer="min_gru", dim=16, n_layers=2, ffn_dim=24, inner_dim=24, convolution=4
    ),
    "mamba2": BaselineConfig(
        mixer="mamba2", dim=16, n_layers=2, ffn_dim=0, num_heads=2, inner_dim=32, state_dim=8
    ),
    "delta_net": BaselineConfig(
        mixer="delta_net", dim=16, n_layers=2, ffn_dim=24, num_heads=2, inner_dim=32, state_dim=8
    ),
}  # fmt: skip


def make(mixer):
    torch.manual_seed(0)
    config = CONFIGS[mixer]
    return Baseline(BaselineConfig(**{**vars(config), "vocab_size": 11}))


@pytest.mark.parametrize("mixer", CONFIGS)
def test_a_token_changes_nothing_before_it(mixer):
    model = make(mixer)
    tokens = torch.randint(11, (2, CHUNK + 9))
    other = tokens.clone()
    other[:, CHUNK + 3] = (tokens[:, CHUNK + 3] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, : CHUNK + 3], after[:, : CHUNK + 3])
    assert not torch.equal(before[:, CHUNK + 3 :], after[:, CHUNK + 3 :])


@pytest.mark.parametrize("mixer", CONFIGS)
def test_every_parameter_gets_a_gradient_and_has_one_place_in_the_optimizer(mixer):
    model = make(mixer)
    tokens = torch.randint(11, (2, 30))
    model.compute_loss(tokens[:, :-1], tokens[:, 1:])["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    groups = model.parameter_groups(0.1, matrices_apart=True)
    listed = [p for group in groups for p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    for name, rows in model.hidden_matrices().items():
        assert sum(rows) == len(model.get_parameter(name))


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_scan_is_the_recurrence_with_its_gradients(steps):
    decay = torch.rand(1, steps, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(1, steps, 3, dtype=torch.float64, requires_grad=True)
    states = [inputs[:, 0]]
    for t in range(1, steps):
        states.append(decay[:, t] * states[-1] + inputs[:, t])
    assert torch.allclose(linear_scan(decay, inputs), torch.stack(states, dim=1))
    assert torch.autograd.gradcheck(linear_scan, (decay, inputs))


@pytest.mark.parametrize("delta_rule", [False, True])
@pytest.mark.parametrize("steps", [1, CHUNK, 2 * CHUNK + 5])
def test_chunks_give_what_the_recurrence_gives(delta_rule, steps):
    generator = torch.Generator().manual_seed(steps)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(draw(2, 3, steps, 4), dim=-1) for _ in "qk")
    v, log_decay = draw(2, 3, steps, 5), -draw(2, 3, steps).exp()
    strength = 2 * torch.sigmoid(draw(2, 3, steps)) if delta_rule else None
    state = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    expected = []
    for t in range(steps):
        state = log_decay[:, :, t, None, None].exp() * state
        u = v[:, :, t]
        if strength is not None:
            held = (state.mT @ k[:, :, t, :, None])[..., 0]
            u = strength[:, :, t, None] * (u - held)
        state = state + k[:, :, t, :, None] * u[:, :, None]
        expected.append((state.mT @ q[:, :, t, :, None])[..., 0])
    found = chunked_states(q, k, v, log_decay, strength)
    assert torch.allclose(found, torch.stack(expected, dim=2))

"""Levels: each span of the past is read with weights of its own."""

import itertools

import pytest
import torch

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.errors import ConfigurationError
from ten_dist.model.block import Block
from ten_dist.model.state import (
    empty_like,
    join_states,
    named_leaves,
    of_named_leaves,
    row_of,
    select_rows,
    state_tensors,
)
from ten_dist.recurrence.bound import EnergyBound
from ten_dist.recurrence.observer import InTurn, observed
from tests.model.test_network import STEPS, make_model, random_ids

LEVELS = (4, 16)
SEPARATOR = 7
OPTIONS = {
    "default": {},
    "one_level": {"levels": (8,)},
    "three_levels": {"levels": (2, 6, 24)},
    "state_gate": {"gate": "state"},
    "convolution": {"short_convolution": 4},
    "masked": {"document_separator_id": SEPARATOR},
    "paper_norm": {"input_norm": "none", "eigenvalue_init": "paper"},
}


def level_model(name="default", **options):
    """One in which the weights of levels are far from 1."""
    model = make_model(**{"levels": LEVELS, **OPTIONS[name], **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.mixer.levels.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def plain_mixer(mixer, u, lengths, numbers):
    """A mixer of gate "output" for one row u [T, d]: every pair of tokens by itself, of the
    documents `numbers`; outputs [T, d] and the mean energy of the state without blocks."""
    k, heads, steps = mixer.num_eigenstates, mixer.num_heads, len(u)
    w_in, w_sel, w_gate = mixer.input_weight.split([2 * k, 2 * k, u.shape[1]])
    p, q = (u @ w_sel.T).split(k, dim=1)
    rho = torch.sigmoid(mixer.alpha + mixer.selection[0] * torch.tanh(p))
    phi = mixer.omega + mixer.selection[1] * torch.tanh(q)
    eigenvalue = torch.polar(rho, phi)
    beta = torch.complex(*(u @ w_in.T).split(k, dim=1))
    written = torch.sqrt(1 - rho**2) * beta
    mu = 2 * torch.sigmoid(u @ mixer.levels.weight.T + mixer.levels.bias)
    mu = mu.view(steps, len(lengths) + 1, heads).repeat_interleave(k // heads, dim=2)
    read, energy = [], 0.0
    for t in range(steps):
        of_token = state = torch.zeros_like(written[0])
        for s in range(t + 1):
            if numbers[s] != numbers[t]:
                continue
            held = eigenvalue[s + 1 : t + 1].prod(dim=0) * written[s]
            nearest = [length for length in lengths if s // length == t // length]
            level = lengths.index(nearest[0]) if nearest else len(lengths)
            of_token = of_token + mu[t, level] * held
            state = state + held
        energy = energy + state.abs().square().sum() / steps
        read.append(torch.cat([of_token.real, of_token.imag]))
    coupling = torch.block_diag(
        *(torch.eye(k // heads) + mixer.coupling_strength * mixer.coupling)
    )
    coupled = torch.stack(read) @ torch.block_diag(coupling, coupling).T
    gate = torch.sigmoid(u @ w_gate.T + mixer.gate_bias)
    return gate * (coupled @ mixer.output_weight.T), energy


@pytest.mark.parametrize("levels", [(4,), (4, 16), (2, 6, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_equal_those_of_a_plain_implementation(levels, masked):
    mixer = level_model(levels=levels).double().blocks[0].mixer
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(1, 35, 24, generator=generator, dtype=torch.float64)
    u.requires_grad_()
    resets = torch.zeros(1, 35, dtype=torch.bool)
    resets[0, [5, 16, 17, 30]] = masked
    weights = torch.randn(35, 24, generator=generator, dtype=torch.float64)
    leaves = {"u": u, **dict(mixer.named_parameters())}
    whole, mean_energy, _ = mixer(u, resets=resets if masked else None)
    plain = plain_mixer(mixer, u[0], levels, resets[0].cumsum(0).tolist())
    found = []
    for outputs, energy in ((whole[0], mean_energy), plain):
        loss = (outputs * weights).sum() + 3 * energy
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        named = dict(zip(leaves, gradients))
        found.append({"outputs": outputs, "energy": energy, **named})
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gate", ["output", "state"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_starts_as_the_flat_network_to_the_bit(gate, autocast):
    ids = random_ids()
    found = []
    for levels in (None, LEVELS):
        torch.manual_seed(0)
        config = TemporalEigenstateConfig.preset(
            "pico", vocab_size=61, dim=24, levels=levels, gate=gate, num_eigenstates=24
        )
        model = TemporalEigenstateNetwork(config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model.compute_loss(ids, ids)
            found.append([model(ids), losses["loss"], losses["energy_loss"]])
    for flat, leveled in zip(*found, strict=True):
        assert torch.equal(flat, leveled)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_token_changes_nothing_before_it(name):
    model, ids = level_model(name), random_ids()
    logits = model(ids)
    for position in range(STEPS):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 61
        new_logits = model(changed)
        assert torch.equal(new_logits[:, :position], logits[:, :position])
        assert not torch.equal(new_logits[:, position], logits[:, position])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_pieces_cut_anywhere_give_what_the_whole_gives(name, seed):
    model, ids = level_model(name), random_ids(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(STEPS - 1, generator=generator) < 0.1 * 3**seed
    stops = [0, *(cuts.nonzero().flatten() + 1).tolist(), STEPS]
    state, outputs = None, []
    for start, stop in itertools.pairwise(stops):
        logits, state = model(ids[:, start:stop], state=state, return_state=True)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "masked", "three_levels"])
@torch.no_grad()
def test_rows_at_positions_of_their_own_give_what_each_alone_gives(name):
    model, ids = level_model(name), random_ids(batch=3)
    ids[1, 19] = SEPARATOR
    read = [1, 5, 21]
    states = [
        model(ids[row : row + 1, :length], return_state=True)[1]
        for row, length in enumerate(read)
    ]
    order = [2, 0, 1]
    state = select_rows(join_states(states), order)
    for steps in (1, 1, 1, 4, 1):
        piece = torch.stack([ids[row, read[row] : read[row] + steps] for row in order])
        logits, state = model(piece, state=state, return_state=True)
        for number, row in enumerate(order):
            read[row] += steps
            whole = model(ids[row : row + 1, : read[row]])
            torch.testing.assert_close(
                logits[number], whole[0, -steps:], rtol=0, atol=1e-5
            )
    alone = row_of(state, 0)
    logits = model(ids[2:, read[2] : read[2] + 9], state=alone)
    whole = model(ids[2:, : read[2] + 9])
    torch.testing.assert_close(logits, whole[:, -9:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_state_has_the_eigenstates_of_every_level_and_its_position():
    _, state = level_model()(random_ids(), return_state=True)
    leveled = state.blocks[0].mixer
    assert leveled.position == STEPS
    assert [tuple(part.shape) for part in leveled.eigenstates] == [(2, 40)] * 3
    assert all(part.dtype == torch.float32 for part in leveled.eigenstates)
    leaves = dict(named_leaves(state))
    again = of_named_leaves(leaves, empty_like(state))
    assert again.blocks[1].mixer.position == STEPS
    assert all(map(torch.equal, state_tensors(again), state_tensors(state)))


@torch.no_grad()
def test_a_head_can_read_what_is_before_its_block_alone():
    """What the block of 16 writes then has no effect within that block."""
    mixer = level_model(n_layers=1).double().blocks[0].mixer
    mixer.levels.weight.zero_()
    # Of both heads mu is 0 for the first two levels, and 2 for the last.
    mixer.levels.bias.copy_(torch.tensor([-1e4, -1e4, -1e4, -1e4, 1e4, 1e4]))
    # Without selection a token has no effect on what is kept of others.
    mixer.input_weight[40:80] = 0.0
    inputs = torch.randn(1, STEPS, 24, dtype=torch.float64)
    outputs = mixer(inputs)[0][0]
    for position in range(16, 32):
        changed = inputs.clone()
        changed[:, position] += 1.0
        moved = (mixer(changed)[0][0] - outputs).abs().amax(dim=1)
        assert moved[:position].max() == 0
        assert (moved[position + 1 : 32] < 1e-12).all()
        assert moved[32:].min() > 1e-9


@pytest.mark.parametrize("name", ["default", "state_gate", "masked"])
def test_recomputing_changes_no_gradient_and_all_parameters_have_one(name):
    gradients = []
    for checkpointing in ("none", "block"):
        model = level_model(name, gradient_checkpointing=checkpointing).train()
        model.compute_loss(random_ids(), random_ids(seed=2))["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, parameter
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["default", "state_gate", "masked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_rounded_products_stay_near_float32(name, dtype, tolerance):
    model, ids, targets = level_model(name), random_ids(), random_ids(seed=2)
    exact = model.compute_loss(ids, targets)
    with torch.autocast("cpu", dtype):
        low = model.compute_loss(ids, targets)
    for part, value in exact.items():
        torch.testing.assert_close(low[part], value, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_frozen_network_computes_the_same():
    model, ids = level_model(), random_ids()
    expected = model(ids)
    model.freeze(torch.float32)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    low = level_model()
    low.freeze(torch.bfloat16)
    assert low.blocks[0].mixer.levels.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        difference = low(ids) - expected
    assert difference.abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_who_observes_sees_one_scan_a_layer_that_holds_the_bound():
    model = level_model()
    bounds = [EnergyBound() for _ in model.blocks]
    with observed(InTurn(bounds)):
        losses = model.compute_loss(random_ids(), random_ids())
    assert all(0 < bound.largest_ratio <= 1 for bound in bounds)
    assert losses["energy_loss"].item() > 0


def test_the_weights_of_levels_are_a_matrix_and_biases():
    model = level_model()
    assert model.hidden_matrices()["blocks.1.mixer.levels.weight"] == (3 * 2,)
    exempt = set(model.parameters_without_weight_decay())
    assert "blocks.1.mixer.levels.bias" in exempt
    flat = make_model().num_parameters()
    assert model.num_parameters() - flat == 2 * (3 * 2 * 24 + 3 * 2)


@pytest.mark.parametrize("resets", [False, True])
def test_a_block_is_one_graph(resets):
    torch.compiler.reset()
    block = Block(level_model().config)
    with torch.no_grad():
        torch.nn.init.normal_(block.mixer.levels.weight)
    hidden = torch.randn(2, 40, 24)
    starts = torch.rand(2, 40) < 0.1 if resets else None
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual, energy, state = compiled(hidden, resets=starts)
    expected = block(hidden, resets=starts)
    torch.testing.assert_close((actual, energy), expected[:2])
    torch.testing.assert_close(state.mixer.eigenstates, expected[2].mixer.eigenstates)
    parameters = list(block.parameters())
    gradients = torch.autograd.grad(actual.square().sum(), parameters)
    plain = torch.autograd.grad(expected[0].square().sum(), parameters)
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, "increasing lengths of blocks"),
        ({"levels": (1, 4)}, "from 2 to"),
        ({"levels": (16, 4)}, "increasing lengths of blocks"),
        ({"levels": (4, 4)}, "increasing lengths of blocks"),
        ({"levels": (4, 6)}, "multiple of the one before"),
        (
            {"levels": (4,), "hten_scales": (1, 2)},
            "--hten_scales and --levels cannot both be given",
        ),
        ({"levels": (4,), "mixer": "attention"}, "levels has no effect with mixer"),
    ],
)
def test_levels_that_cannot_be_built_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        TemporalEigenstateConfig(**fields)


def test_a_preset_with_scales_takes_levels_in_their_place():
    config = TemporalEigenstateConfig.preset("large", levels=LEVELS)
    assert (config.hten_scales, config.levels) == (None, LEVELS)
    with pytest.raises(ConfigurationError, match="cannot both be given"):
        TemporalEigenstateConfig.preset("large", levels=LEVELS, hten_scales=(1, 2))

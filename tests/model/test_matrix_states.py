"""Layers whose eigenstates carry vectors (docs/model.md#matrix-states)."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.config.model import PAPER
from ten_dist.errors import ConfigurationError
from ten_dist.matrix_recurrence import matrix_scan
from ten_dist.model.matrix_mixer import MatrixMixer
from ten_dist.model.state import join_states, row_of, state_bytes
from ten_dist.recurrence.bound import EnergyBound
from ten_dist.recurrence.observer import observed
from tests.model.test_network import STEPS, VOCAB, make_model, random_ids

N = 3
MODELS = {
    "all": {"state_dim": N},
    "two": {"state_dim": 2, "input_norm": "none"},
    "some": {"state_dim": N, "matrix_layers": (1,), "matrix_eigenstates": 12},
    "static": {
        "state_dim": N,
        "input_norm": "static",
        "learnable_selection_range": False,
    },
    "paper": {**PAPER, "state_dim": N},
    "convolution": {"state_dim": N, "short_convolution": 3, "ffn_gate": True},
    "hierarchy": {"state_dim": N, "scales": (1, 2, 4), "matrix_eigenstates": 12},
    "hierarchy_some": {"state_dim": N, "scales": (1, 4), "matrix_layers": (0,)},
}
every_model = pytest.mark.parametrize("name", MODELS)


def matrix_model(name, **options):
    return make_model(**{**MODELS[name], **options})


def plain_mixer(mixer, u):
    """docs/model.md#matrix-states, number by number: outputs, and the energy of an entry
    summed over eigenstates."""
    heads, n, k = mixer.num_heads, mixer.state_dim, mixer.num_eigenstates
    rows = [2 * k, 2 * k, 2 * k, heads * n, heads * n]
    key, modulation, query, value, gate = (u @ mixer.input_weight.T).split(rows, -1)
    key, query = (torch.complex(x[..., :k], x[..., k:]) for x in (key, query))
    ranges = mixer.selection_range if mixer.selection is None else mixer.selection
    logit = mixer.alpha + ranges[0] * torch.tanh(modulation[..., :k])
    angle = mixer.omega + ranges[1] * torch.tanh(modulation[..., k:])
    eigenvalue = torch.sigmoid(logit) * torch.exp(1j * angle)
    of = {"none": None, "static": mixer.alpha.expand_as(logit), "dynamic": logit}
    gain = torch.ones_like(logit)
    if (decay := of[mixer.input_norm]) is not None:
        gain = torch.sqrt(1 - torch.sigmoid(decay) ** 2)
    outputs, energy = [], 0.0
    batch, steps, _ = u.shape
    for b in range(batch):
        matrix = torch.zeros(k, n, dtype=torch.complex128)
        for t in range(steps):
            read = []
            new = []
            for h, head in enumerate(torch.arange(k).chunk(heads)):
                v = value[b, t, h * n : h * n + n]
                written = torch.outer(gain[b, t, head] * key[b, t, head], v + 0j)
                of_head = eigenvalue[b, t, head, None] * matrix[head] + written
                o = (query[b, t, head].conj() @ of_head).real * (k // heads) ** -0.5
                read.append(o / torch.sqrt(o.square().mean() + 1e-5))
                new.append(of_head)
            matrix = torch.cat(new)
            energy = energy + matrix.abs().square().sum() / (n * batch * steps)
            gated = F.silu(gate[b, t] + mixer.gate_bias) * torch.cat(read)
            outputs.append(mixer.output_weight @ gated)
    return torch.stack(outputs).unflatten(0, (batch, steps)), energy


def plain_hierarchy(hierarchy, u):
    """docs/model.md#hierarchy, position by position."""
    steps, outputs, energy = u.shape[1], 0.0, 0.0
    for part in hierarchy.scales:
        s = part.scale
        coarse = [
            sum(u[:, i] for i in range(max(0, end - s + 1), end + 1)) / s
            for end in range(0, steps, s)
        ]
        z, of_scale = plain_mixer(part.ten, torch.stack(coarse, dim=1))
        z = F.pad(z @ part.mixing.weight.T, (0, 0, 1, 0))
        weights = [(t // s, (t % s + 1) / s) for t in range(steps)]
        faded = [(1 - w) * z[:, j] + w * z[:, j + 1] for j, w in weights]
        outputs, energy = outputs + torch.stack(faded, dim=1), energy + of_scale
    return outputs, energy


@every_model
@pytest.mark.parametrize("steps", [1, 14])
def test_layers_and_gradients_equal_plain_ones(name, steps):
    """In float64, with the input's gradient; other layers of a model are of other files."""
    model = matrix_model(name).double()
    generator = torch.Generator().manual_seed(3)
    u, weights = torch.randn(2, 2, steps, 24, generator=generator, dtype=torch.float64)
    u.requires_grad_()
    for block in model.blocks:
        mixer = block.mixer
        if not any(isinstance(module, MatrixMixer) for module in mixer.modules()):
            continue
        plain = plain_mixer if isinstance(mixer, MatrixMixer) else plain_hierarchy
        leaves = {"u": u, **dict(mixer.named_parameters())}
        results = []
        for outputs, energy in (mixer(u)[:2], plain(mixer, u)):
            loss = (outputs * weights).sum() + 3 * energy
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            named = dict(zip(leaves, gradients))
            results.append({"outputs": outputs, "energy": energy, **named})
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@every_model
@torch.no_grad()
def test_a_token_changes_nothing_before_it(name):
    model = matrix_model(name)
    ids = random_ids()
    logits = model(ids)
    for position in range(STEPS):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        new_logits = model(changed)
        assert torch.equal(new_logits[:, :position], logits[:, :position])
        assert not torch.equal(new_logits[:, position], logits[:, position])


@every_model
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_streaming_at_random_cuts_equals_the_whole(name, seed):
    model = matrix_model(name)
    ids = random_ids(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(STEPS - 1, generator=generator) < (1.0, 0.3, 0.05)[seed]
    stops = [0, *(cuts.nonzero().flatten() + 1).tolist(), STEPS]
    state, outputs = None, []
    for start, stop in itertools.pairwise(stops):
        logits, state = model(ids[:, start:stop], state=state, return_state=True)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), rtol=0, atol=5e-5)


@every_model
@torch.no_grad()
def test_rows_may_be_at_positions_of_their_own(name):
    model, ids = matrix_model(name), random_ids(batch=3)
    read = (4, 9, 15)
    states = [
        row_of(model(ids[row : row + 1, :length], return_state=True)[1], 0)
        for row, length in enumerate(read)
    ]
    state, found = join_states(states), []
    for step in range(6):
        tokens = [ids[row, length + step] for row, length in enumerate(read)]
        logits, state = model(
            torch.stack(tokens).unsqueeze(1), state=state, return_state=True
        )
        found.append(logits)
    for row, length in enumerate(read):
        whole = model(ids[row : row + 1, : length + 6])[0, length:]
        torch.testing.assert_close(torch.cat(found, 1)[row], whole, rtol=0, atol=1e-5)


@every_model
def test_recomputation_changes_no_gradient_and_all_parameters_have_one(name):
    gradients = []
    for checkpointing in ("none", "block"):
        model = matrix_model(name, gradient_checkpointing=checkpointing).train()
        model.compute_loss(random_ids(), random_ids(seed=2))["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, parameter
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@every_model
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_autocast_stays_near_float32(name, dtype, tolerance):
    model = matrix_model(name)
    ids, targets = random_ids(), random_ids(seed=2)
    exact = model.compute_loss(ids, targets)
    with torch.autocast("cpu", dtype):
        low = model.compute_loss(ids, targets)
    for part, value in exact.items():
        torch.testing.assert_close(low[part], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["all", "some", "hierarchy"])
def test_it_learns_in_parameters_of_bfloat16(name):
    model = matrix_model(name).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, losses = random_ids(), []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.compute_loss(ids[:, :-1], ids[:, 1:])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_energy_is_the_mean_of_an_entry_over_all_layers():
    """Each layer's, whatever it carries: weights of the loss mean the same in all models."""
    model = matrix_model("some")
    means = {}

    class Squares:
        def see(self, inputs, states, column=0):
            squares = 2 * states.square().mean()
            means.setdefault(states.shape[-1], []).append(squares)

    with observed(Squares()):
        energy = model.compute_loss(random_ids(), random_ids())["energy_loss"]
    # A layer of 20 eigenstates, and one of 12 that carry three numbers each.
    assert {halves: len(found) for halves, found in means.items()} == {40: 1, 24: N}
    layers = [torch.stack(found).mean() for found in means.values()]
    torch.testing.assert_close(energy, torch.stack(layers).mean())
    decays = [torch.sigmoid(block.mixer.alpha).square().sum() for block in model.blocks]
    model = matrix_model("some", energy_kind="eigenvalue")
    energy = model.compute_loss(random_ids(), random_ids())["energy_loss"]
    torch.testing.assert_close(energy, sum(decays) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_model
@torch.no_grad()
def test_the_energy_keeps_its_bound(name, dtype):
    model, ids = matrix_model(name), random_ids()
    with (
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        observed(EnergyBound()) as bound,
    ):
        _, state = model(ids, return_state=True)
        model(ids, state=state)
    # The states of layers without matrices are rounded to bfloat16.
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    assert 0 < bound.largest_ratio <= 1 + rounding
    assert 0 < bound.eigenvalue_distance < 0.5


@torch.no_grad()
def test_a_backend_that_does_not_compute_the_recurrence_is_found(monkeypatch):
    right = matrix_scan.__globals__["_BACKENDS"]["reference"]

    def wrong(inputs):
        outputs, final_state, energy = right(inputs)
        return outputs, 100 * final_state, energy

    monkeypatch.setitem(matrix_scan.__globals__["_BACKENDS"], "wrong", wrong)
    model = matrix_model("all")
    for block in model.blocks:
        block.mixer.scan_backend = "wrong"
    with observed(EnergyBound()) as bound:
        model(random_ids())
    assert bound.largest_ratio > 2


@every_model
@torch.no_grad()
def test_the_state_has_the_size_that_is_told(name):
    """2K N numbers of float32 a layer, whatever was read."""
    model = matrix_model(name)
    config, sizes = model.config, set()
    for steps in (20, 40):
        _, state = model(random_ids(steps=steps), return_state=True)
        sizes.add(state_bytes(state))
    numbers = 0
    for layer in range(config.n_layers):
        carried = config.state_dim if config.carries_matrices(layer) else 1
        numbers += 2 * config.eigenstates_of(layer) * carried
        if config.hten_scales is not None:
            # Of each scale a running sum, and its last two outputs.
            numbers += 3 * config.dim * len(config.scales)
        numbers += max(0, config.short_convolution - 1) * config.dim
    assert sizes == {2 * 4 * numbers}


def test_parameters_are_counted_by_the_formula():
    fields = {"vocab_size": 1000, "num_eigenstates": 96, "state_dim": 16}
    config = TemporalEigenstateConfig.preset("pico", **fields)
    d, k, values = config.dim, 96, config.num_heads * 16
    mixer = d * (6 * k + 3 * values) + values + 4 * k
    rest = 4 * d + d * config.ffn_dim * 3 + 2 * config.ffn_dim + d
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(config)
    expected = 1000 * d + config.n_layers * (mixer + rest) + 2 * d
    assert model.num_parameters() == expected
    # Those of the recurrence are without weight decay, and no matrices of Muon's.
    exempt = set(model.parameters_without_weight_decay())
    matrices = model.hidden_matrices()
    of_mixer = {
        n for n, _ in model.named_parameters() if n.startswith("blocks.0.mixer.")
    }
    assert {name.split(".")[-1] for name in of_mixer - exempt} == {
        "input_weight",
        "output_weight",
    }
    assert of_mixer - exempt == of_mixer & set(matrices)
    assert matrices["blocks.0.mixer.input_weight"] == (
        2 * k,
        2 * k,
        2 * k,
        values,
        values,
    )


def test_initial_values_are_those_of_the_page():
    config = TemporalEigenstateConfig.preset("pico", state_dim=8, max_timescale=512)
    mixer = TemporalEigenstateNetwork(config).blocks[-1].mixer
    memory = (1 + mixer.alpha.exp()).unflatten(0, (config.num_heads, -1))
    # Each head has memories of all lengths.
    assert (memory.amin(dim=1) < 1.1).all() and (memory.amax(dim=1) > 450).all()
    assert (mixer.omega == 0).all() and (mixer.gate_bias == 0).all()
    assert (mixer.selection[0] == 8).all()
    assert (mixer.input_weight[mixer.rows_of("selection")] == 0).all()
    for name in ("input", "query", "value"):
        rows = mixer.input_weight[mixer.rows_of(name)]
        gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 1}, "--state_dim must be from 2 to 4,096, not 1"),
        ({"matrix_layers": (1,)}, "matrix_layers needs state_dim"),
        ({"matrix_eigenstates": 8}, "matrix_eigenstates needs state_dim"),
        ({"state_dim": 4, "matrix_layers": ()}, "matrix_layers .* from 0 to 11"),
        ({"state_dim": 4, "matrix_layers": (1, 12)}, "matrix_layers 1,12 must be"),
        ({"state_dim": 4, "matrix_layers": (2, 1)}, "matrix_layers 2,1 must be"),
        ({"state_dim": 4, "matrix_eigenstates": 0}, "--matrix_eigenstates must be"),
        ({"state_dim": 4, "matrix_eigenstates": 30}, "change matrix_eigenstates or"),
        (
            {"state_dim": 4, "matrix_eigenstates": 40, "hten_scales": (1, 2, 4)},
            "matrix_eigenstates 40 does not divide over the 3",
        ),
        ({"state_dim": 4, "gate": "state"}, "gate state has no effect .* state_dim"),
        ({"state_dim": 4, "mixer": "attention"}, "state_dim has no effect with mixer"),
        ({**PAPER, "matrix_layers": (1,)}, "matrix_layers needs state_dim"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TemporalEigenstateConfig.preset("nano", **options)


def test_the_gate_of_the_other_layers_may_act_on_their_states():
    options = {"state_dim": 4, "matrix_layers": (0,), "gate": "state"}
    assert make_model(**options)(random_ids()).isfinite().all()

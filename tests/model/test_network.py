"""Behaviour that every TEN and HTEN model must have."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.config.model import PAPER
from ten_dist.model.mixer import EigenstateMixer
from ten_dist.recurrence import eigenstate_scan

VOCAB = 61
STEPS = 51
QUALITY_OPTIONS = {
    "paper": PAPER,
    "short_convolution": {"short_convolution": 4},
    "state_gate": {"gate": "state"},
    "plain_mlp": {"ffn_gate": False},
    "static_norm": {"input_norm": "static"},
    "fixed_selection_range": {
        "learnable_selection_range": False,
        "selection_range": (4.0, 0.5),
    },
    "all": {
        "short_convolution": 3,
        "gate": "state",
        "max_timescale": 64,
    },
}
MODELS = [
    None,
    (1,),
    (1, 2),
    (1, 2, 4),
    (1, 2, 4, 8, 16),
    (1, 16),
]


def make_model(scales=None, **options):
    """A small model in which every parameter matters to the output."""
    torch.manual_seed(0)
    config = TemporalEigenstateConfig(
        **{
            "vocab_size": VOCAB,
            "dim": 24,
            "n_layers": 2,
            "num_eigenstates": 20 if scales is None or len(scales) != 3 else 24,
            "num_heads": 2,
            "hten_scales": scales,
            **options,
        }
    )
    model = TemporalEigenstateNetwork(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def random_ids(batch=2, steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, steps), generator=generator)


@pytest.mark.parametrize("scales", MODELS)
@pytest.mark.parametrize("eigenvalue_init", ["paper", "timescale"])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(scales, eigenvalue_init):
    model = make_model(scales, eigenvalue_init=eigenvalue_init)
    ids = random_ids()
    logits = model(ids)
    # More positions than the largest scale has phases.
    for position in range(STEPS):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        new_logits = model(changed)
        assert torch.equal(new_logits[:, :position], logits[:, :position])
        assert not torch.equal(new_logits[:, position], logits[:, position])


@pytest.mark.parametrize("scales", MODELS)
@pytest.mark.parametrize(
    "pieces", [[1] * STEPS, [STEPS - 1, 1], [3, 1, 20, 27], [17, 15, 19]]
)
@torch.no_grad()
def test_streaming_equals_parallel(scales, pieces):
    model = make_model(scales)
    ids = random_ids()
    state, outputs = None, []
    for piece in ids.split(pieces, dim=1):
        logits, state = model(piece, state=state, return_state=True)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
@pytest.mark.parametrize("options", QUALITY_OPTIONS.values(), ids=QUALITY_OPTIONS)
@torch.no_grad()
def test_options_are_causal_and_stream(scales, options):
    model = make_model(scales, **options)
    ids = random_ids()
    logits = model(ids)
    for position in range(STEPS):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        assert torch.equal(model(changed)[:, :position], logits[:, :position])
    for pieces in ([1] * STEPS, [3, 1, 20, 27]):
        state, outputs = None, []
        for piece in ids.split(pieces, dim=1):
            piece_logits, state = model(piece, state=state, return_state=True)
            outputs.append(piece_logits)
        torch.testing.assert_close(torch.cat(outputs, 1), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", MODELS)
def test_loss_is_cross_entropy_and_weighted_energy(scales):
    model = make_model(scales, energy_reg_weight=0.02)
    ids, targets = random_ids(), random_ids(seed=2)
    targets[0, :7] = -100
    losses = model.compute_loss(ids, targets, return_dict=True)
    assert losses["loss"] == losses["ce_loss"] + 0.02 * losses["energy_loss"]
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses["ce_loss"], expected)
    assert model.compute_loss(ids, targets, return_dict=False) == losses["loss"]
    for row in range(2):
        alone = model.compute_loss(ids[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(losses["row_losses"][row], alone["ce_loss"])


def test_z_loss_is_a_part_of_its_own():
    model = make_model(z_loss_weight=0.1, energy_reg_weight=0.02)
    plain = make_model(energy_reg_weight=0.02)
    losses = model.compute_loss(random_ids(), random_ids(seed=2))
    expected = plain.compute_loss(random_ids(), random_ids(seed=2))
    partition = plain(random_ids()).logsumexp(-1).square().mean()
    torch.testing.assert_close(losses["z_loss"], 0.1 * partition)
    torch.testing.assert_close(losses["ce_loss"], expected["ce_loss"])
    torch.testing.assert_close(losses["loss"], expected["loss"] + losses["z_loss"])
    assert "z_loss" not in expected


def test_loss_of_a_batch_without_targets_is_zero():
    model = make_model()
    losses = model.compute_loss(random_ids(), torch.full((2, STEPS), -100))
    assert losses["ce_loss"] == 0


def assert_all_close(actual, expected, tolerance):
    """Compare tensors by name, so that a failure says which one differs."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plain_loss(model, ids, targets):
    """The loss of a one-scale model, written down again from docs/model.md."""
    config = model.config
    p = dict(model.named_parameters()) | dict(model.named_buffers())
    hidden = p["embedding.weight"][ids]
    energy = 0.0
    for layer in range(config.n_layers):
        w = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{layer}.")
        }
        u = F.layer_norm(
            hidden, (config.dim,), w["mixer_norm.weight"], w["mixer_norm.bias"]
        )
        if config.short_convolution:
            width = config.short_convolution
            kernel = w["convolution.filter"].flip(0).T.unsqueeze(1)
            past = F.pad(u.transpose(1, 2), (width - 1, 0))
            u = F.conv1d(past, kernel, groups=config.dim).transpose(1, 2)
        k = config.num_eigenstates
        w_in, w_sel = w["mixer.input_weight"][: 4 * k].split(2 * k)
        gate = u @ w["mixer.input_weight"][4 * k :].T + w["mixer.gate_bias"]
        c, _ = eigenstate_scan(
            u @ w_in.T,
            w["mixer.alpha_base"] + w["mixer.alpha_offset"],
            w["mixer.omega_base"] + w["mixer.omega_offset"],
            u @ w_sel.T,
            w.get("mixer.selection", config.selection_range),
            config.input_norm,
            backend="reference",
        )
        energy = energy + c.square().sum(-1).mean() / k / config.n_layers
        coupling = torch.eye(k // config.num_heads) + (
            w["mixer.coupling_strength"] * w["mixer.coupling"]
        )
        if config.gate == "state":
            c = c * F.silu(gate)
        heads = c.unflatten(-1, (2, config.num_heads, -1))
        coupled = torch.einsum("hij,btphj->btphi", coupling, heads).flatten(-3)
        y = coupled @ w["mixer.output_weight"].T
        hidden = hidden + (y if config.gate == "state" else torch.sigmoid(gate) * y)
        v = F.layer_norm(
            hidden,
            (config.dim,),
            w["feed_forward_norm.weight"],
            w["feed_forward_norm.bias"],
        )
        up = v @ w["feed_forward.up.weight"].T + w["feed_forward.up.bias"]
        if config.ffn_gate:
            v = F.silu(up[..., : config.ffn_dim]) * up[..., config.ffn_dim :]
        else:
            v = F.silu(up)
        hidden = (
            hidden + v @ w["feed_forward.down.weight"].T + w["feed_forward.down.bias"]
        )
    hidden = F.layer_norm(
        hidden, (config.dim,), p["final_norm.weight"], p["final_norm.bias"]
    )
    logits = hidden @ p["embedding.weight"].T
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return ce + config.energy_reg_weight * energy


@pytest.mark.parametrize("weight", [0.0, 0.05])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    "options", [{}, *QUALITY_OPTIONS.values()], ids=["default", *QUALITY_OPTIONS]
)
def test_gradients_equal_those_of_a_plain_implementation(
    weight, checkpointing, options
):
    model = make_model(
        energy_reg_weight=weight, gradient_checkpointing=checkpointing, **options
    ).double()
    model.train()
    ids, targets = random_ids(), random_ids(seed=2)
    loss = model.compute_loss(ids, targets)["loss"]
    expected_loss = plain_loss(model, ids, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    names, parameters = zip(*model.named_parameters())
    expected = torch.autograd.grad(expected_loss, parameters)
    assert_all_close(
        dict(zip(names, torch.autograd.grad(loss, parameters))),
        dict(zip(names, expected)),
        1e-10,
    )


def plain_hierarchy(mixer, u, scales, heads):
    """HTEN of docs/model.md#hierarchy, position by position; returns outputs and summed energy."""
    steps, outputs, energy = u.shape[1], 0.0, 0.0
    for s, part in zip(scales, mixer.scales):
        ten, zero = part.ten, torch.zeros_like(u[:, 0])
        coarse = torch.stack(
            [
                sum(u[:, i] for i in range(max(0, j * s - s + 1), j * s + 1)) / s
                for j in range(-(-steps // s))
            ],
            dim=1,
        )
        k = ten.alpha.numel()
        w_in, w_sel, w_gate = ten.input_weight.split([2 * k, 2 * k, u.shape[2]])
        c, _ = eigenstate_scan(
            coarse @ w_in.T,
            ten.alpha,
            ten.omega,
            coarse @ w_sel.T,
            ten.selection,
            ten.input_norm,
            backend="reference",
        )
        energy = energy + c.square().sum(-1).mean()
        coupling = torch.eye(k // heads) + ten.coupling_strength * ten.coupling
        coupled = torch.einsum(
            "hij,btphj->btphi", coupling, c.unflatten(-1, (2, heads, -1))
        )
        gate = torch.sigmoid(coarse @ w_gate.T + ten.gate_bias)
        z = gate * (coupled.flatten(-3) @ ten.output_weight.T) @ part.mixing.weight.T
        faded = []
        for t in range(steps):
            j, r = divmod(t, s)
            before = z[:, j - 1] if j > 0 else zero
            weight = (r + 1) / s
            faded.append((1 - weight) * before + weight * z[:, j])
        outputs = outputs + torch.stack(faded, dim=1)
    return outputs, energy


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8, 16)])
@pytest.mark.parametrize("steps", [1, 7, 51])
def test_hierarchy_equals_a_plain_implementation(scales, steps):
    model = make_model(scales).double()
    mixer = model.blocks[0].mixer
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(2, steps, 24, generator=generator, dtype=torch.float64)
    parameters = dict(mixer.named_parameters())
    weights = torch.randn(u.shape, generator=generator, dtype=torch.float64)
    results = []
    for outputs, energy in (mixer(u)[:2], plain_hierarchy(mixer, u, scales, 2)):
        loss = (outputs * weights).sum() + 3 * energy
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named = dict(zip(parameters, gradients))
        results.append({"outputs": outputs, "energy": energy, **named})
    assert_all_close(*results, 1e-10)


@torch.no_grad()
def test_energy_is_a_mean_over_eigenstates_batch_time_and_layers():
    model = make_model((1, 2, 4)).double()
    energies = []
    for block in model.blocks:
        block.mixer.register_forward_hook(
            lambda mixer, inputs, _: energies.append(
                plain_hierarchy(mixer, inputs[0], (1, 2, 4), 2)[1]
            )
        )
    energy = model.compute_loss(random_ids(), random_ids())["energy_loss"]
    expected = sum(energies) / len(energies) / model.config.num_eigenstates
    torch.testing.assert_close(energy, expected)


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
@pytest.mark.parametrize("energy_kind", ["state", "eigenvalue"])
def test_checkpointing_changes_no_gradient_and_all_parameters_have_one(
    scales, energy_kind
):
    gradients = []
    for checkpointing in ("none", "block"):
        model = make_model(
            scales, gradient_checkpointing=checkpointing, energy_kind=energy_kind
        ).train()
        model.compute_loss(random_ids(), random_ids(seed=2))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
    assert_all_close(gradients[0], gradients[1], 1e-6)


@torch.no_grad()
def test_energy_of_eigenvalues_is_that_of_alpha():
    model = make_model((1, 2, 4), energy_kind="eigenvalue")
    decays = [
        torch.sigmoid(module.alpha).square().sum()
        for module in model.modules()
        if isinstance(module, EigenstateMixer)
    ]
    energy = model.compute_loss(random_ids(), random_ids())["energy_loss"]
    torch.testing.assert_close(energy, sum(decays) / model.config.n_layers)


@pytest.mark.parametrize(
    ("eigenvalue_init", "input_norm", "selection_range", "scales"),
    list(
        itertools.product(
            ["paper", "timescale"],
            ["none", "static", "dynamic"],
            [(0.1, 0.1), (2.0, 0.5)],
            [None, (1, 2, 4)],
        )
    ),
)
def test_every_option_trains(eigenvalue_init, input_norm, selection_range, scales):
    torch.manual_seed(0)
    config = TemporalEigenstateConfig(
        vocab_size=VOCAB,
        dim=24,
        n_layers=2,
        num_eigenstates=24,
        num_heads=2,
        hten_scales=scales,
        energy_reg_weight=0.02,
        eigenvalue_init=eigenvalue_init,
        input_norm=input_norm,
        selection_range=selection_range,
    )
    model = TemporalEigenstateNetwork(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = random_ids(steps=STEPS + 1)
    losses = []
    for _ in range(12):
        loss = model.compute_loss(ids[:, :-1], ids[:, 1:])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_standard_model_starts_near_a_uniform_guess():
    torch.manual_seed(0)
    config = TemporalEigenstateConfig.preset("nano", energy_reg_weight=0.01)
    model = TemporalEigenstateNetwork(config)
    assert 0.98 * 33e6 < model.num_parameters() < 1.02 * 33e6
    ids = torch.randint(50257, (1, 129))
    losses = model.compute_loss(ids[:, :-1], ids[:, 1:])
    assert 10.7 <= losses["ce_loss"] <= 11.0
    assert losses["loss"] == losses["ce_loss"] + 0.01 * losses["energy_loss"]


def test_initial_values_survive_construction():
    config = TemporalEigenstateConfig.preset("pico", eigenvalue_init="paper")
    model = TemporalEigenstateNetwork(config)
    for block in model.blocks:
        mixer = block.mixer
        assert (mixer.gate_bias == -2).all()
        assert -3 <= mixer.alpha.min() and mixer.alpha.max() <= 0
        wide = mixer.input_weight[: 2 * mixer.num_eigenstates]
        gram = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    config = TemporalEigenstateConfig.preset(
        "pico", eigenvalue_init="timescale", max_timescale=512
    )
    for layer, block in enumerate(TemporalEigenstateNetwork(config).blocks):
        memory = 1 + block.mixer.alpha.exp()
        longest = 512 ** ((layer + 1) / config.n_layers)
        assert 1 < memory.min() < 1.1
        assert 0.95 * longest < memory.max() <= longest
        assert torch.equal(block.mixer.selection[0], torch.full_like(memory, 8.0))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("nano", 33),
        ("micro", 85),
        ("small", 180),
        ("medium", 320),
        ("large", 520),
        ("xlarge", 1200),
    ],
)
def test_preset_sizes(name, millions):
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(TemporalEigenstateConfig.preset(name))
    assert abs(model.num_parameters() / (millions * 1e6) - 1) < 0.02
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert model.num_parameters() == total


def test_pico_size_with_the_quickstart_vocabulary():
    for scales in (None, (1, 2, 4)):
        config = TemporalEigenstateConfig.preset(
            "pico", vocab_size=4096, hten_scales=scales
        )
        with torch.device("meta"):
            assert 1e6 < TemporalEigenstateNetwork(config).num_parameters() < 3e6


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_takes_up_to_five_scales(name, scales):
    config = TemporalEigenstateConfig.preset(name, hten_scales=scales)
    assert config.eigenstates_per_scale * len(scales) == config.num_eigenstates


def test_recurrence_norms_and_biases_take_no_weight_decay():
    model = make_model((1, 2, 4))
    exempt = set(model.parameters_without_weight_decay())
    names = {name for name, _ in model.named_parameters()}
    assert exempt <= names
    for name in names:
        kind = name.rsplit(".", 1)[-1]
        matrix = kind in ("input_weight", "output_weight") or (
            kind == "weight" and "norm" not in name
        )
        assert (name in exempt) != matrix, name


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_autocast_stays_near_float32(scales, dtype, tolerance):
    model = make_model(scales)
    ids, targets = random_ids(), random_ids(seed=2)
    exact = model.compute_loss(ids, targets)
    with torch.autocast("cpu", dtype):
        low = model.compute_loss(ids, targets)
    for name, value in exact.items():
        torch.testing.assert_close(low[name], value, rtol=tolerance, atol=tolerance)

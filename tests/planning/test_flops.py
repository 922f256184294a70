"""Operations by the formula beside those that torch's profiler counts, and by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.model import linear
from ten_dist.optimizer.newton_schulz import newton_schulz_flops, orthogonalize
from ten_dist.planning.sharding import Sharding, Workload
from ten_dist.planning.step_time import (
    count_operations,
    flops_of_update,
    training_flops_per_token,
)

SMALL = {
    # A multiple of 64: no operation is spent on zeros that fill it up.
    "vocab_size": 320,
    "dim": 64,
    "n_layers": 2,
    "num_eigenstates": 48,
    "num_heads": 2,
}
ROWS, SEQ_LEN = 2, 120
TINY = {"vocab_size": 50, "dim": 16, "n_layers": 3, "num_eigenstates": 12}
TINY["ffn_gate"] = False
HEAD = 50 * 16
MLP = 2 * 16 * 64


@pytest.fixture(autouse=True)
def products_that_the_profiler_knows(monkeypatch):
    """torch's own, also where oneDNN's are faster."""
    monkeypatch.setattr(linear, "is_made_by_amd", lambda: False)


def profiled(config, autocast=False):
    """Operations of forward and backward that torch's profiler counts."""
    model = TemporalEigenstateNetwork(config)
    tokens = torch.randint(config.vocab_size, (ROWS, SEQ_LEN + 1))
    counter = FlopCounterMode(display=False)
    # It knows the attention that is made of plain products.
    with counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model.compute_loss(tokens[:, :-1], tokens[:, 1:])
        losses["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "state"},
        {"short_convolution": 4},
        {"ffn_gate": False},
        {"hten_scales": (1, 2, 4, 8)},
        # Of 120 tokens the coarsest scale takes 7.5 steps: the last is begun.
        {"hten_scales": (1, 2, 4, 16)},
        {"levels": (4, 16)},
        {"levels": (4,), "gradient_checkpointing": "block"},
        {"gradient_checkpointing": "block"},
        {"gradient_checkpointing": "block", "ffn_gate": False},
        {"hten_scales": (1, 2), "gradient_checkpointing": "block"},
    ],
    ids=str,
)
def test_operations_are_those_of_the_profiler(fields, autocast):
    config = TemporalEigenstateConfig(**SMALL, **fields)
    operations = count_operations(config, SEQ_LEN)
    counted = operations.of_micro_batch(ROWS * SEQ_LEN)
    assert counted == pytest.approx(profiled(config, autocast), rel=0.005)


def test_attention_counts_what_the_mask_leaves():
    config = TemporalEigenstateConfig(**SMALL, mixer="attention")
    operations = count_operations(config, SEQ_LEN)
    counted = operations.of_micro_batch(ROWS * SEQ_LEN)
    # Plain products compute the half, too, that the mask then takes away.
    masked = config.n_layers * 12 * config.dim * (SEQ_LEN - 1) / 2 * ROWS * SEQ_LEN
    assert counted + masked == pytest.approx(profiled(config), rel=0.005)


@pytest.mark.parametrize(
    "fields",
    [
        {"state_dim": 8},
        {"state_dim": 8, "matrix_layers": (1,), "matrix_eigenstates": 16},
        {"state_dim": 8, "hten_scales": (1, 16)},
    ],
    ids=str,
)
def test_matrix_layers_count_beside_what_the_profiler_sees(fields):
    """It sees no product that is made element by element, as the oracle makes all."""
    config = TemporalEigenstateConfig(**SMALL, **fields)
    operations = count_operations(config, SEQ_LEN)
    scans = 0.0
    for layer in range(config.n_layers):
        if config.carries_matrices(layer):
            for scale in config.scales:
                eigenstates = config.eigenstates_per_scale_of(layer)
                scans += 3 * 14 * 8 * eigenstates * -(-SEQ_LEN // scale) * ROWS
    counted = operations.of_micro_batch(ROWS * SEQ_LEN)
    assert scans > 0.005 * counted
    assert counted - scans == pytest.approx(profiled(config), rel=0.005)


def test_coarse_scales_cost_their_share():
    """An eigenstate of scale s costs 1/s of one of every token."""
    mixers = {}
    for scales in ((1,), (1, 2), (1, 2, 4)):
        config = TemporalEigenstateConfig(**SMALL, hten_scales=scales)
        with_mixer = count_operations(config, 128).per_token
        mlp = 3 * config.ffn_dim * config.dim * config.n_layers
        mixers[scales] = with_mixer - 6 * (mlp + config.vocab_size * config.dim)
    d, eigenstates = SMALL["dim"], SMALL["num_eigenstates"]
    for scales, measured in mixers.items():
        each = 6 * eigenstates // len(scales) * d + d * d + d * d
        wanted = 6 * SMALL["n_layers"] * sum(each / scale for scale in scales)
        assert measured == pytest.approx(wanted)


@pytest.mark.parametrize("preset", ["large", "xlarge"])
def test_large_presets_without_their_values(preset):
    config = TemporalEigenstateConfig.preset(preset)
    assert set(PRESETS) >= {preset}
    with torch.device("meta"):
        model = TemporalEigenstateNetwork(config)
    operations = count_operations(config, 2048)
    # Fewer than 6 a parameter: coarse scales compute at their rate.
    assert 0.5 * 6 < operations.per_token / model.num_parameters() < 6


def tiny_network(**fields):
    return TemporalEigenstateNetwork(
        TemporalEigenstateConfig(**TINY, num_heads=2, **fields)
    )


def test_operations_of_a_ten_by_hand():
    # W_in and W_sel 2K each, the gate d, then W_out.
    mixer = 16 * (24 + 24 + 16) + 24 * 16
    expected = 6 * (3 * (mixer + MLP) + HEAD)
    assert training_flops_per_token(tiny_network(), steps=100) == expected
    learnable = tiny_network(learnable_selection_range=True)
    assert training_flops_per_token(learnable, steps=7) == expected


def test_coarse_scales_count_at_their_rate():
    # Of one scale: 6 eigenstates, its own gate, and the mixing matrix.
    scale = 16 * (12 + 12 + 16) + 12 * 16 + 16 * 16
    expected = 6 * (3 * (scale * (1 + 1 / 4) + MLP) + HEAD)
    model = tiny_network(hten_scales=(1, 4))
    assert training_flops_per_token(model, steps=100) == pytest.approx(expected)


def test_attention_counts_the_positions_that_a_token_sees():
    model = tiny_network(mixer="attention")
    matrices = 6 * (3 * (4 * 16 * 16 + MLP) + HEAD)
    # One token attends to itself alone: 2 products of 16, 2 operations each, 3 times.
    one = training_flops_per_token(model, steps=1)
    assert one == matrices + 3 * (2 * 2 * 16) * 3
    three = training_flops_per_token(model, steps=3)
    assert three - matrices == 2 * (one - matrices)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (160, 32)])
def test_operations_of_newton_schulz_are_those_of_the_profiler(shape):
    counter = FlopCounterMode(display=False)
    with counter:
        orthogonalize(torch.randn(shape))
    assert newton_schulz_flops(*shape) == counter.get_total_flops()


def test_ranks_share_the_operations_of_muon():
    config = TemporalEigenstateConfig.preset("pico", **SMALL)
    work = Workload(1, 128, optimizer="muon")
    whole, shared = (flops_of_update(config, Sharding(1, n), work) for n in (1, 4))
    assert whole / 4 <= shared < 0.4 * whole
    assert flops_of_update(config, Sharding(1, 1), Workload(1, 128)) == 0

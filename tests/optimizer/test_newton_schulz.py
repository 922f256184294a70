"""Orthogonal updates against singular values, and how weights are split for them."""

import pytest
import torch

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.optimizer import shared_matrices
from ten_dist.optimizer.muon import Muon
from ten_dist.optimizer.newton_schulz import newton_schulz_flops, orthogonalize
from ten_dist.optimizer.shared_matrices import (
    LogicalMatrix,
    rounds_of,
    split_weights,
)


def with_singular_values(rows, columns, values):
    generator = torch.Generator().manual_seed(rows)
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator), full_matrices=False
    )
    return u, v, u @ torch.diag(values) @ v


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (96, 24), (24, 96)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_singular_values_come_near_one_and_vectors_stay(rows, columns, size):
    # Down to a twentieth of the largest, whatever the matrix is multiplied with.
    u, v, matrix = with_singular_values(
        rows, columns, torch.linspace(0.05, 1, min(rows, columns))
    )
    found = u.T @ orthogonalize(matrix * size) @ v.T
    values = found.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (found - torch.diag(values)).abs().max() < 1e-4


def test_rows_far_below_the_others_are_zeros():
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    small = torch.cat([matrix, matrix * 1e-20])
    expected = torch.cat([orthogonalize(matrix), torch.zeros(12, 20)])
    torch.testing.assert_close(orthogonalize(small), expected, atol=1e-5, rtol=0)


def test_zeros_stay_zeros():
    assert not orthogonalize(torch.zeros(8, 4)).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "state", "short_convolution": 4, "learnable_selection_range": True},
        {"hten_scales": (1, 2)},
        {"mixer": "attention"},
    ],
)
def test_every_matrix_of_a_block_is_split_into_its_projections(options):
    config = TemporalEigenstateConfig.preset("pico", vocab_size=64, **options)
    model = TemporalEigenstateNetwork(config)
    rows = model.hidden_matrices()
    shapes = {name: model.get_parameter(name).shape for name in rows}
    found = split_weights(shapes, rows)
    assert sum(m.elements for m in found) == sum(s.numel() for s in shapes.values())
    width, dim = 2 * config.eigenstates_per_scale, config.dim
    for name, parts in rows.items():
        if name.endswith("input_weight"):
            gate = width if config.gate == "state" else dim
            attends = config.mixer == "attention"
            assert parts == ((dim,) * 3 if attends else (width, width, gate))
        elif name.endswith("up.weight"):
            assert parts == (config.ffn_dim, config.ffn_dim)
        else:
            assert len(parts) == 1
    # Whatever else has two dimensions is no map of the residual stream.
    others = {
        name.rsplit(".", 1)[-1]
        for name, p in model.named_parameters()
        if p.dim() > 1 and name not in rows
    }
    assert others <= {"weight", "filter", "selection", "coupling"}
    assert ("embedding.weight" in rows) is False


def test_rows_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="has 5 rows, not 4"):
        split_weights({"w": (5, 3)}, {"w": (2, 2)})


def test_each_matrix_has_one_owner_and_work_is_shared(monkeypatch):
    monkeypatch.setattr(shared_matrices, "ROUND_ELEMENTS", 5000)
    matrices = [
        LogicalMatrix(f"{layer}-{rows}", 0, rows, 64)
        for layer in range(12)
        for rows in (64, 64, 32, 128)
    ]
    rounds = rounds_of(matrices, 4)
    taken = [pair for one in rounds for pair in one]
    assert sorted(m.weight for _, m in taken) == sorted(m.weight for m in matrices)
    costs = [sum(m.flops for owner, m in taken if owner == rank) for rank in range(4)]
    assert max(costs) - min(costs) <= max(m.flops for m in matrices)
    for one in rounds:
        for rank in range(4):
            sizes = [m.elements for owner, m in one if owner == rank]
            assert len(sizes) < 2 or sum(sizes) <= 5000
    assert newton_schulz_flops(32, 64) == newton_schulz_flops(64, 32)


@pytest.mark.parametrize("rows", [(48,), (16, 24, 8)])
def test_steps_are_those_of_torch(rows):
    """Torch's own Muon has each projection as a parameter of its own; it computes in
    bfloat16, so that the steps agree to its precision."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(48, 16, generator=generator))
    vector = torch.nn.Parameter(torch.zeros(3))
    parts = [torch.nn.Parameter(p.clone()) for p in weight.detach().split(rows)]
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    expected = torch.optim.Muon(parts, **options, nesterov=True, ns_steps=5)
    found = Muon({"params": [weight], **options}, torch.optim.AdamW([vector], lr=0.1))
    found.keep_whole({"w": weight}, {"w": rows})
    before = weight.detach().clone()
    for _ in range(4):
        gradient = torch.randn(48, 16, generator=generator)
        for part, of_part in zip(parts, gradient.split(rows)):
            part.grad = of_part.clone()
        weight.grad, vector.grad = gradient.clone(), torch.ones(3)
        expected.step()
        found.step()
    moved = torch.cat([p.detach() for p in parts]) - before
    difference = weight.detach() - before - moved
    assert difference.norm() < 0.02 * moved.norm()
    torch.testing.assert_close(
        vector.detach(), torch.full((3,), -0.4), atol=0.02, rtol=0
    )

"""Cross-entropy in pieces against torch's, on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from ten_dist.model import linear_cross_entropy as module
from ten_dist.model.linear_cross_entropy import linear_cross_entropy


def make_inputs(dtype=torch.float64, rows=37, dim=12, vocab=50):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, rows, dim, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (3, rows), generator=generator)
    targets[1, 5:20] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden, weight, targets, z_loss_weight):
    logits = (hidden @ weight.T).flatten(0, 1)
    ce_loss = F.cross_entropy(logits, targets.flatten())
    counted = logits[targets.flatten() != -100]
    return ce_loss + z_loss_weight * counted.logsumexp(1).square().mean()


@pytest.mark.parametrize("at_once", [1, 800, 2700, 2**25])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
def test_pieces_of_any_size_give_the_whole(monkeypatch, at_once, z_loss_weight):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    hidden, weight, targets = make_inputs()
    loss, z_loss, positions = linear_cross_entropy(
        hidden, weight, targets, z_loss_weight
    )
    expected = plain(hidden, weight, targets, z_loss_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert (z_loss == 0) == (z_loss_weight == 0)
    each = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(positions, each.view_as(targets), rtol=1e-12, atol=1e-12)
    assert not positions.requires_grad
    actual = torch.autograd.grad(3 * loss, (hidden, weight))
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_rounded_products_stay_near_float32(dtype, tolerance):
    hidden, weight, targets = make_inputs(torch.float32)
    exact = plain(hidden, weight, targets, 0.0)
    wanted = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype):
        loss, *_ = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=tolerance, atol=tolerance)
    for gradient, value in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
        assert gradient.dtype == torch.float32
        assert (gradient - value).abs().max() < tolerance * value.abs().max()


def test_float16_neither_loses_nor_overflows_the_gradient_of_many_positions():
    """Of one target among many positions: 1/N is zero in float16, their sum infinite."""
    positions = 70_000
    hidden = torch.ones(positions, 2, requires_grad=True)
    weight = torch.zeros(3, 2, requires_grad=True)
    targets = torch.ones(positions, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        loss, *_ = linear_cross_entropy(hidden * 2, weight, targets)
    gradient = torch.autograd.grad(loss, weight)[0]
    expected = torch.tensor([[2 / 3] * 2, [-4 / 3] * 2, [2 / 3] * 2])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_whole_logits_never_exist(monkeypatch):
    """The largest tensor made on the way is a piece of the logits."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4000)
    hidden, weight, targets = make_inputs(torch.float32, rows=400)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (50,):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert 0 < largest <= 1000


def test_nothing_counts():
    hidden, weight, targets = make_inputs()
    loss, *_ = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss == 0
    assert torch.autograd.grad(loss, hidden)[0].abs().max() == 0

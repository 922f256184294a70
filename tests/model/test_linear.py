"""Linear maps by oneDNN against those of torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from ten_dist.model import linear as module
from ten_dist.model.linear import linear, takes_onednn

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here"
)


@pytest.fixture(autouse=True)
def as_on_amd(monkeypatch):
    monkeypatch.setattr(module, "is_made_by_amd", lambda: True)


def make_inputs(rows, inside=48, outside=33):
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # Inputs as parts of a wider tensor, as projections are.
    inputs = normal(2, rows, 3 * inside)[..., inside : 2 * inside]
    return inputs, normal(outside, inside), normal(outside)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("outside", [33, 200])
@pytest.mark.parametrize("rows", [1, 31, 32, 500])
def test_values_and_gradients(rows, outside, with_bias):
    inputs, weight, bias = make_inputs(rows, outside=outside)
    leaves = [inputs, weight, bias] if with_bias else [inputs, weight]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(2, rows, outside)
    found, expected = linear(*leaves), F.linear(*wide)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(found, leaves, upstream)
    for gradient, value in zip(
        gradients, torch.autograd.grad(expected, wide, upstream.double())
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), value, rtol=1e-5, atol=1e-3)


@needs_onednn
def test_a_weight_alone_can_take_a_gradient():
    inputs, weight, _ = make_inputs(100)
    weight.requires_grad_()
    linear(inputs, weight).sum().backward()
    expected = inputs.sum(dim=(0, 1)).expand_as(weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-3)
    assert weight.grad.is_contiguous()


@needs_onednn
def test_autocast_keeps_its_own_products():
    inputs, weight, _ = make_inputs(100)
    assert takes_onednn(inputs, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(inputs, weight)
        assert linear(inputs, weight).dtype == torch.bfloat16
    assert not takes_onednn(inputs.double(), weight)


def test_other_processors_keep_torch_s_choice(monkeypatch):
    monkeypatch.setattr(module, "is_made_by_amd", lambda: False)
    inputs, weight, bias = make_inputs(100)
    assert not takes_onednn(inputs, weight)
    assert torch.equal(linear(inputs, weight, bias), F.linear(inputs, weight, bias))

"""The C++ cross-entropy against torch's in float64, on the same rounded logits."""

import pytest
import torch

from ten_dist import native

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason="there is no C++ compiler"
)
# Largest errors of losses, and of gradients relative to the largest gradient or weight.
TOLERANCE = {torch.float32: (3e-6, 1e-6), torch.bfloat16: (3e-6, 4e-3)}


def make_rows(dtype, width, rows=9, scale=4.0):
    """Logits in the middle of a wider tensor, targets and weights of the rows."""
    generator = torch.Generator().manual_seed(width)
    whole = scale * torch.randn(rows, width + 7, generator=generator)
    targets = torch.randint(width, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    weights[2] = 0.0
    return whole.to(dtype)[:, 3 : 3 + width], targets, weights


def expected_of(logits, targets, weights, z_loss_weight):
    values = logits.double().requires_grad_()
    log_partition = values.logsumexp(dim=1)
    losses = log_partition - values.gather(1, targets[:, None]).squeeze(1)
    total = ((losses + z_loss_weight * log_partition.square()) * weights).sum()
    total.backward()
    return losses.detach(), log_partition.detach(), values.grad


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 5, 16, 33, 4096, 50257])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
def test_losses_and_gradients(dtype, width, z_loss_weight):
    logits, targets, weights = make_rows(dtype, width)
    around = logits._base.clone()
    losses, log_partition, gradient = expected_of(
        logits, targets, weights, z_loss_weight
    )
    found = torch.ops.ten_dist_cpu.cross_entropy_(
        logits, targets, weights, z_loss_weight, True
    )
    of_losses, of_gradient = TOLERANCE[dtype]
    torch.testing.assert_close(found[0].double(), losses, atol=of_losses, rtol=1e-6)
    torch.testing.assert_close(found[1].double(), log_partition, atol=1e-6, rtol=1e-6)
    # Differences of numbers of the size of the weights.
    largest = torch.maximum(gradient.abs().max(), weights.max())
    assert (logits - gradient).abs().max() <= of_gradient * largest
    assert logits[2].count_nonzero() == 0
    # What lies beside the rows is not theirs.
    outside = torch.ones(width + 7, dtype=torch.bool)
    outside[3 : 3 + width] = False
    assert torch.equal(logits._base[:, outside], around[:, outside])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_without_a_gradient_the_logits_stay(dtype):
    logits, targets, weights = make_rows(dtype, 100)
    before = logits.clone()
    losses = expected_of(logits, targets, weights, 0.0)[0]
    found, _ = torch.ops.ten_dist_cpu.cross_entropy_(
        logits, targets, weights, 0.0, False
    )
    torch.testing.assert_close(found.double(), losses, atol=3e-6, rtol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_large_logits_do_not_overflow(dtype):
    logits, targets, weights = make_rows(dtype, 70, scale=1e4)
    losses, _, gradient = expected_of(logits, targets, weights, 0.0)
    found, _ = torch.ops.ten_dist_cpu.cross_entropy_(
        logits, targets, weights, 0.0, True
    )
    torch.testing.assert_close(found.double(), losses, atol=0, rtol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, atol=4e-3, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    """Training finds a broken step by its loss."""
    logits, targets, weights = make_rows(torch.float32, 40)
    logits[4, 35] = bad
    losses, _ = torch.ops.ten_dist_cpu.cross_entropy_(
        logits, targets, weights, 0.0, True
    )
    assert not losses[4].isfinite() and losses[5:].isfinite().all()
    assert logits[4].isnan().any() and logits[5:].isfinite().all()


@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_the_vocabulary_is_refused(target):
    logits, targets, weights = make_rows(torch.float32, 40)
    targets[3] = target
    with pytest.raises(
        IndexError, match=f"target {target} is not in a vocabulary of 40"
    ):
        torch.ops.ten_dist_cpu.cross_entropy_(logits, targets, weights, 0.0, True)

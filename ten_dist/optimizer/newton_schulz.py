"""Newton-Schulz: the orthogonal matrix that is near a matrix, by products alone.

Of a matrix G = U S V^T it gives about U V^T, five iterations of

    X <- a X + (b A + c A A) X,  A = X X^T,  (a, b, c) = (3.4445, -4.7750, 2.0315)

begun at G / |G|, |G| the Frobenius norm. The coefficients are those of Muon (Keller Jordan,
"Muon: An optimizer for hidden layers in neural networks", 2024), chosen for the steepest
slope at zero: singular values of X end between 0.7 and 1.2 and not at 1, but also those that
began at a hundredth of the norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ten_dist.model.linear import linear

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
NEGLIGIBLE = 1e-8
"""Elements of G / |G| up to this count as zero."""


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of a matrix with singular value decomposition U S V^T; zeros of zeros.

    Args:
        matrix: [r, c] float32.
        dtype: of the products; on GPUs those in 16 bits are many times faster.

    Returns:
        [r, c] in `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    smallest = torch.finfo(matrix.dtype).tiny
    x = matrix / torch.linalg.matrix_norm(matrix).clamp(min=smallest)
    # Squares of what is far below the rest would be subnormal, and processors are twenty
    # times as slow with these. It would stay below rounding: 3.4445^5 is less than 500.
    x = F.hardshrink(x, NEGLIGIBLE).to(dtype)
    # X X^T is then the smaller one of the two.
    x = x.T.contiguous() if tall else x
    for _ in range(ITERATIONS):
        gram = linear(x, x)
        x = a * x + linear(b * gram + c * linear(gram, gram), x.T)
    return x.T if tall else x


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Floating-point operations of :func:`orthogonalize` for [rows, columns]: with r the
    smaller of them and c the larger, 2 r^2 c twice and 2 r^3 an iteration."""
    r, c = sorted((rows, columns))
    return ITERATIONS * (4 * r * r * c + 2 * r**3)

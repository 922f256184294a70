"""Eigenvalues and input gain in Triton, in float32 (docs/model.md#scan).

An error of an eigenvalue is multiplied by the memory of its eigenstate, 10^4 steps where
the decay is 0.9999, so decay and rotation are exact to the last bits of float32; the
approximate functions of the GPU serve only where their error is damped.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of GAIN, the input gain g.
NO_GAIN = tl.constexpr(0)
STATIC_GAIN = tl.constexpr(1)
DYNAMIC_GAIN = tl.constexpr(2)


@triton.jit
def sine_cosine(x):
    """sin x and cos x, absolute error below 1e-7 for |x| up to 1e4.

    x = n pi/2 + r with |r| <= pi/4, minimax polynomials in r, then the quadrant.
    """
    # Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
    shifted = x * 0.6366197723675814 + 12582912.0
    n = shifted - 12582912.0
    # pi/2 in three parts; n times the first is exact.
    r = x - n * 1.5703125
    r = r - n * 4.837512969970703e-4
    r = r - n * 7.549789954891882e-8
    r2 = r * r
    s = (-1.9517233e-4 * r2 + 8.3321777e-3) * r2 - 1.66666549e-1
    s = s * r2 * r + r
    c = (2.4433081e-5 * r2 - 1.38873156e-3) * r2 + 4.166664567e-2
    c = (c * r2 - 0.5) * r2 + 1.0
    quadrant = shifted.to(tl.int32, bitcast=True)
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def tanh_pair(p, q):
    """tanh p and tanh q with one division; e^(-2|x|) cannot overflow."""
    e_p = tl.exp2(tl.abs(p) * -2.8853900817779268)
    e_q = tl.exp2(tl.abs(q) * -2.8853900817779268)
    a = 1.0 + e_p
    b = 1.0 + e_q
    inverse = 1.0 / (a * b)
    t_p = (1.0 - e_p) * (b * inverse)
    t_q = (1.0 - e_q) * (a * inverse)
    return tl.where(p < 0, -t_p, t_p), tl.where(q < 0, -t_q, t_q)


@triton.jit
def decay_and_complement(logit):
    """rho = sigmoid(logit) and 1 - rho, the smaller of the two from its own formula.

    The larger is 1 minus the smaller, so that the error of the approximate division is
    relative to the smaller.
    """
    e = tl.exp2(tl.abs(logit) * -1.4426950408889634)
    small = e / (1.0 + e)
    large = 1.0 - small
    slow = logit >= 0
    return tl.where(slow, large, small), tl.where(slow, small, large)


@triton.jit
def load_terms(alpha, omega, ranges, k, mask, WIDTH: tl.constexpr):
    """What belongs to eigenstates and does not change in time.

    Returns:
        base: alpha, cos omega, sin omega, s_a, s_w.
        fixed: lambda without modulation, as `eigenvalue` returns it; both tanh are 0.
        gain: sqrt(1 - rho^2) of the base decay.
    """
    logit = tl.load(alpha + k, mask=mask, other=0.0)
    sine, cosine = sine_cosine(tl.load(omega + k, mask=mask, other=0.0))
    decay_range = tl.load(ranges + k, mask=mask, other=0.0)
    rotation_range = tl.load(ranges + WIDTH + k, mask=mask, other=0.0)
    decay, complement = decay_and_complement(logit)
    none = decay_range * 0.0
    fixed = (decay * cosine, decay * sine, decay, complement, none, none)
    base = (logit, cosine, sine, decay_range, rotation_range)
    return base, fixed, input_gain(decay, complement)


@triton.jit
def eigenvalue(terms, modulation, MODULATED: tl.constexpr):
    """lambda of one step: Re, Im, rho, 1 - rho, tanh p, tanh q."""
    base, value, _ = terms
    if MODULATED:
        value = _modulated_eigenvalue(base, modulation[0], modulation[1])
    return value


@triton.jit
def _modulated_eigenvalue(base, p, q):
    logit, cosine, sine, decay_range, rotation_range = base
    bounded_p, bounded_q = tanh_pair(p.to(tl.float32), q.to(tl.float32))
    decay, complement = decay_and_complement(logit + decay_range * bounded_p)
    turn_sine, turn_cosine = sine_cosine(rotation_range * bounded_q)
    real = decay * (cosine * turn_cosine - sine * turn_sine)
    imaginary = decay * (sine * turn_cosine + cosine * turn_sine)
    return real, imaginary, decay, complement, bounded_p, bounded_q


@triton.jit
def step_gain(terms, value, GAIN: tl.constexpr):
    """g of one step, which is not NO_GAIN."""
    gain = terms[2]
    if GAIN == DYNAMIC_GAIN:
        gain = input_gain(value[2], value[3])
    return gain


@triton.jit
def input_gain(decay, complement):
    """sqrt(1 - rho^2), without the difference of numbers near 1."""
    return tl.sqrt(complement * (1.0 + decay))


@triton.jit
def input_gain_slope(decay, complement):
    """d sqrt(1 - rho^2) / d logit = -rho^2 sqrt((1 - rho) / (1 + rho))."""
    return -decay * decay * tl.sqrt(complement / (1.0 + decay))


@triton.jit
def multiply(a, b):
    """a b, of complex numbers as pairs."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def multiply_conjugate(a, b):
    """conj(a) b, of complex numbers as pairs."""
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]

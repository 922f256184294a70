"""The eigenstate scan in Triton, forward: reduce and scan (docs/model.md#scan).

    c_t = lambda_t c_{t-1} + g_t beta_t

See `triton_chunks` for how time is cut. Eigenvalues are computed from the modulation in
both kernels: nothing of size T x K exists that the caller does not hold. `beta` and
`modulation` are [B, T, 2K] of any strides with a unit last one; `states` is contiguous;
alpha, omega [K], ranges [2, K], final [B, 2K] are float32. With RESET, `resets` [B, T]
uint8 says before which steps the state is dropped; it is contiguous.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.recurrence.triton_arithmetic import (
    NO_GAIN,
    eigenvalue,
    load_terms,
    multiply,
    step_gain,
)
from ten_dist.recurrence.triton_chunks import (
    SIZES,
    dropped,
    load_flags,
    load_pair,
    load_rows,
    moved,
    place_of_program,
    store_pair,
)

_NOT_SPECIALIZED = [*SIZES, "beta_batch", "modulation_batch"]


@triton.jit
def _step(state, beta, value, terms, GAIN: tl.constexpr):
    """lambda c + g beta."""
    carried = multiply(value, state)
    real = beta[0].to(tl.float32)
    imaginary = beta[1].to(tl.float32)
    if GAIN != NO_GAIN:
        gain = step_gain(terms, value, GAIN)
        real *= gain
        imaginary *= gain
    return carried[0] + real, carried[1] + imaginary


@triton.jit
def _reduce_steps(
    carried,
    rows,
    strides,
    terms,
    mask,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    RESET: tl.constexpr,
    COUNT: tl.constexpr,
):
    state, product = carried
    beta, modulation, resets = rows
    beta_step, modulation_step, _ = strides
    flags = load_flags(resets, 1, RESET, COUNT)
    inputs = load_rows(beta, beta_step, mask, WIDTH, COUNT)
    logits = inputs
    if MODULATED:
        logits = load_rows(modulation, modulation_step, mask, WIDTH, COUNT)
    for i in tl.static_range(COUNT):
        value = eigenvalue(terms, logits[i], MODULATED)
        state = dropped(state, flags[i], RESET)
        state = _step(state, inputs[i], value, terms, GAIN)
        product = multiply(value, dropped(product, flags[i], RESET))
    return state, product


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def reduce_forward(
    beta,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    product,
    local,
    steps,
    chunk,
    beta_batch,
    beta_step,
    modulation_batch,
    modulation_step,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Product of the eigenvalues of each chunk, and its end state from zero."""
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    start = index.to(tl.int64) * chunk
    count = tl.minimum(steps - index * chunk, chunk)
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    rows = (
        beta + row * beta_batch + start * beta_step + k,
        modulation + row * modulation_batch + start * modulation_step + k,
        resets + row * steps + start,
    )
    strides = (beta_step, modulation_step, 1)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    carried = ((zero, zero), (zero + 1.0, zero))
    for _ in range(count // UNROLL):
        carried = _reduce_steps(
            carried, rows, strides, terms, mask, WIDTH, MODULATED, GAIN, RESET, UNROLL
        )
        rows = moved(rows, strides, UNROLL)
    for _ in range(count % UNROLL):
        carried = _reduce_steps(
            carried, rows, strides, terms, mask, WIDTH, MODULATED, GAIN, RESET, 1
        )
        rows = moved(rows, strides, 1)
    place = (row * tl.num_programs(1) + index) * 2 * WIDTH + k
    store_pair(local + place, carried[0], mask, WIDTH)
    store_pair(product + place, carried[1], mask, WIDTH)


@triton.jit
def _scan_steps(
    carried,
    rows,
    strides,
    terms,
    mask,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    RESET: tl.constexpr,
    COUNT: tl.constexpr,
):
    state, energy = carried
    beta, modulation, resets, states = rows
    beta_step, modulation_step, _, _ = strides
    flags = load_flags(resets, 1, RESET, COUNT)
    inputs = load_rows(beta, beta_step, mask, WIDTH, COUNT)
    logits = inputs
    if MODULATED:
        logits = load_rows(modulation, modulation_step, mask, WIDTH, COUNT)
    for i in tl.static_range(COUNT):
        value = eigenvalue(terms, logits[i], MODULATED)
        state = dropped(state, flags[i], RESET)
        state = _step(state, inputs[i], value, terms, GAIN)
        energy += state[0] * state[0] + state[1] * state[1]
        store_pair(states + i * 2 * WIDTH, state, mask, WIDTH)
    return state, energy


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def scan_forward(
    beta,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    entering,
    states,
    final,
    energy,
    steps,
    chunk,
    beta_batch,
    beta_step,
    modulation_batch,
    modulation_step,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    RESET: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """States, final state, and energy [B, chunks, K], from what enters each chunk."""
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    chunks = tl.num_programs(1)
    start = index.to(tl.int64) * chunk
    count = tl.minimum(steps - index * chunk, chunk)
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    rows = (
        beta + row * beta_batch + start * beta_step + k,
        modulation + row * modulation_batch + start * modulation_step + k,
        resets + row * steps + start,
        states + (row * steps + start) * 2 * WIDTH + k,
    )
    strides = (beta_step, modulation_step, 1, 2 * WIDTH)
    place = row * chunks + index
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    state = (zero, zero)
    if HAS_ENTERING:
        state = load_pair(entering + place * 2 * WIDTH + k, mask, WIDTH)
    carried = (state, zero)
    for _ in range(count // UNROLL):
        carried = _scan_steps(
            carried, rows, strides, terms, mask, WIDTH, MODULATED, GAIN, RESET, UNROLL
        )
        rows = moved(rows, strides, UNROLL)
    for _ in range(count % UNROLL):
        carried = _scan_steps(
            carried, rows, strides, terms, mask, WIDTH, MODULATED, GAIN, RESET, 1
        )
        rows = moved(rows, strides, 1)
    tl.store(energy + place * WIDTH + k, carried[1], mask=mask)
    last = index == chunks - 1
    store_pair(final + row * 2 * WIDTH + k, carried[0], mask & last, WIDTH)

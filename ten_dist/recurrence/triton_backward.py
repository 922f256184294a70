"""The eigenstate scan in Triton, backward: reduce and scan against time (docs/model.md#scan).

With w_t the gradient of the states, E that of the energy, and r_T that of the final state,

    G_t = w_t + 2 E c_t + r_{t+1},    r_t = conj(lambda_t) G_t

What crosses from chunk to chunk is r, and r_0 is the gradient of the initial state. Every
other gradient follows from G_t and z_t = conj(G_t) lambda_t c_{t-1} = conj(r_t) c_{t-1}.

With RESET, `resets` [B, T] uint8, contiguous, says where c_{t-1} had no part in c_t:
there r_t is zero. See `triton_chunks` for how time is cut. `gradient`, `beta` and `modulation` are
[B, T, 2K] of any strides with a unit last one; `states`, `grad_beta` and
`grad_modulation` are contiguous; alpha, omega [K], ranges [2, K], initial [B, 2K] and
grad_energy [B, K] are float32.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.recurrence.triton_arithmetic import (
    DYNAMIC_GAIN,
    NO_GAIN,
    eigenvalue,
    input_gain_slope,
    load_terms,
    multiply_conjugate,
    step_gain,
)
from ten_dist.recurrence.triton_chunks import (
    SIZES,
    dropped,
    load_flags,
    load_pair,
    load_rows,
    load_states_before,
    moved,
    place_of_program,
    store_pair,
)

_NOT_SPECIALIZED = [*SIZES, "gradient_batch", "beta_batch", "modulation_batch"]


@triton.jit
def _adjoint(entering, gradient, state, energy_weight, ENERGY: tl.constexpr):
    """G_t."""
    real = entering[0] + gradient[0].to(tl.float32)
    imaginary = entering[1] + gradient[1].to(tl.float32)
    if ENERGY:
        real += energy_weight * state[0].to(tl.float32)
        imaginary += energy_weight * state[1].to(tl.float32)
    return real, imaginary


@triton.jit
def _reduce_steps(
    carried,
    rows,
    strides,
    fixed,
    mask,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    ENERGY: tl.constexpr,
    RESET: tl.constexpr,
    COUNT: tl.constexpr,
):
    entering, product = carried
    terms, energy_weight = fixed
    gradient, modulation, resets, states = rows
    gradient_step, modulation_step, _, _ = strides
    flags = load_flags(resets, -1, RESET, COUNT)
    gradients = load_rows(gradient, gradient_step, mask, WIDTH, COUNT)
    logits = gradients
    current = gradients
    if MODULATED:
        logits = load_rows(modulation, modulation_step, mask, WIDTH, COUNT)
    if ENERGY:
        current = load_rows(states, -2 * WIDTH, mask, WIDTH, COUNT)
    for i in tl.static_range(COUNT):
        value = eigenvalue(terms, logits[i], MODULATED)
        adjoint = _adjoint(entering, gradients[i], current[i], energy_weight, ENERGY)
        entering = dropped(multiply_conjugate(value, adjoint), flags[i], RESET)
        product = dropped(multiply_conjugate(value, product), flags[i], RESET)
    return entering, product


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def reduce_backward(
    gradient,
    grad_energy,
    states,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    product,
    local,
    steps,
    chunk,
    gradient_batch,
    gradient_step,
    modulation_batch,
    modulation_step,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    ENERGY: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Product of the conjugate eigenvalues of each chunk, and r before it from zero."""
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    count = tl.minimum(steps - index * chunk, chunk)
    last = index.to(tl.int64) * chunk + count - 1
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    rows = (
        gradient + row * gradient_batch + last * gradient_step + k,
        modulation + row * modulation_batch + last * modulation_step + k,
        resets + row * steps + last,
        states + (row * steps + last) * 2 * WIDTH + k,
    )
    strides = (-gradient_step, -modulation_step, -1, -2 * WIDTH)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    energy_weight = zero
    if ENERGY:
        energy_weight = 2.0 * tl.load(grad_energy + row * WIDTH + k, mask, other=0.0)
    fixed = (terms, energy_weight)
    carried = ((zero, zero), (zero + 1.0, zero))
    for _ in range(count // UNROLL):
        carried = _reduce_steps(
            carried, rows, strides, fixed, mask, WIDTH, MODULATED, ENERGY, RESET, UNROLL
        )
        rows = moved(rows, strides, UNROLL)
    for _ in range(count % UNROLL):
        carried = _reduce_steps(
            carried, rows, strides, fixed, mask, WIDTH, MODULATED, ENERGY, RESET, 1
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
    step,
    fixed,
    mask,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    ENERGY: tl.constexpr,
    RESET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    COUNT: tl.constexpr,
):
    entering, current, sums = carried
    terms, energy_weight, initial = fixed
    gradient, beta, modulation, resets, states, grad_beta, grad_modulation = rows
    gradient_step, beta_step, modulation_step, _, _, _, _ = strides
    sum_logit, sum_rotation, sum_decay_range, sum_rotation_range = sums
    gradients = load_rows(gradient, gradient_step, mask, WIDTH, COUNT)
    flags = load_flags(resets, -1, RESET, COUNT)
    before = load_states_before(states, initial, step, mask, WIDTH, HAS_INITIAL, COUNT)
    logits = gradients
    inputs = gradients
    if MODULATED:
        logits = load_rows(modulation, modulation_step, mask, WIDTH, COUNT)
    if GAIN != NO_GAIN:
        inputs = load_rows(beta, beta_step, mask, WIDTH, COUNT)
    for i in tl.static_range(COUNT):
        value = eigenvalue(terms, logits[i], MODULATED)
        adjoint = _adjoint(entering, gradients[i], current, energy_weight, ENERGY)
        entering = dropped(multiply_conjugate(value, adjoint), flags[i], RESET)
        current = (before[i][0].to(tl.float32), before[i][1].to(tl.float32))
        z = multiply_conjugate(entering, current)
        grad_logit = value[3] * z[0]
        grad_rotation = -z[1]
        grad_input = adjoint
        if GAIN != NO_GAIN:
            gain = step_gain(terms, value, GAIN)
            grad_input = (gain * adjoint[0], gain * adjoint[1])
            grad_gain = adjoint[0] * inputs[i][0].to(tl.float32)
            grad_gain += adjoint[1] * inputs[i][1].to(tl.float32)
            if GAIN == DYNAMIC_GAIN:
                grad_logit += input_gain_slope(value[2], value[3]) * grad_gain
            else:
                # The static gain depends on alpha alone, not on the modulated logit.
                base = terms[1]
                sum_logit += input_gain_slope(base[2], base[3]) * grad_gain
        store_pair(grad_beta - i * 2 * WIDTH, grad_input, mask, WIDTH)
        sum_logit += grad_logit
        sum_rotation += grad_rotation
        if MODULATED:
            bounded_p = value[4]
            bounded_q = value[5]
            sum_decay_range += bounded_p * grad_logit
            sum_rotation_range += bounded_q * grad_rotation
            grad_p = terms[0][3] * (1.0 - bounded_p * bounded_p) * grad_logit
            grad_q = terms[0][4] * (1.0 - bounded_q * bounded_q) * grad_rotation
            store_pair(grad_modulation - i * 2 * WIDTH, (grad_p, grad_q), mask, WIDTH)
    sums = (sum_logit, sum_rotation, sum_decay_range, sum_rotation_range)
    return entering, current, sums


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def scan_backward(
    gradient,
    grad_energy,
    entering,
    states,
    beta,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    initial,
    grad_beta,
    grad_modulation,
    grad_initial,
    sums,
    steps,
    chunk,
    gradient_batch,
    gradient_step,
    beta_batch,
    beta_step,
    modulation_batch,
    modulation_step,
    WIDTH: tl.constexpr,
    MODULATED: tl.constexpr,
    GAIN: tl.constexpr,
    ENERGY: tl.constexpr,
    RESET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """All gradients, from the r that enters each chunk [B, chunks, 2K] at its end.

    `sums` [B, chunks, 4, K] are parts of the gradients of alpha, omega and the two
    ranges, to be added up in one order.
    """
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    count = tl.minimum(steps - index * chunk, chunk)
    step = index * chunk + count - 1
    last = index.to(tl.int64) * chunk + count - 1
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    place = (row * steps + last) * 2 * WIDTH + k
    states += place
    rows = (
        gradient + row * gradient_batch + last * gradient_step + k,
        beta + row * beta_batch + last * beta_step + k,
        modulation + row * modulation_batch + last * modulation_step + k,
        resets + row * steps + last,
        # A step reads the state before it.
        states - 2 * WIDTH,
        grad_beta + place,
        grad_modulation + place,
    )
    width = 2 * WIDTH
    strides = (-gradient_step, -beta_step, -modulation_step, -1, -width, -width, -width)
    initial += row * 2 * WIDTH + k
    place = row * tl.num_programs(1) + index
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    carried_in = (zero, zero)
    if HAS_ENTERING:
        carried_in = load_pair(entering + place * 2 * WIDTH + k, mask, WIDTH)
    current = (zero, zero)
    energy_weight = zero
    if ENERGY:
        energy_weight = 2.0 * tl.load(grad_energy + row * WIDTH + k, mask, other=0.0)
        pair = load_pair(states, mask, WIDTH)
        current = (pair[0].to(tl.float32), pair[1].to(tl.float32))
    fixed = (terms, energy_weight, initial)
    carried = (carried_in, current, (zero, zero, zero, zero))
    for _ in range(count // UNROLL):
        carried = _scan_steps(
            carried,
            rows,
            strides,
            step,
            fixed,
            mask,
            WIDTH,
            MODULATED,
            GAIN,
            ENERGY,
            RESET,
            HAS_INITIAL,
            UNROLL,
        )
        rows = moved(rows, strides, UNROLL)
        step -= UNROLL
    for _ in range(count % UNROLL):
        carried = _scan_steps(
            carried,
            rows,
            strides,
            step,
            fixed,
            mask,
            WIDTH,
            MODULATED,
            GAIN,
            ENERGY,
            RESET,
            HAS_INITIAL,
            1,
        )
        rows = moved(rows, strides, 1)
        step -= 1
    first = mask & (index == 0)
    store_pair(grad_initial + row * 2 * WIDTH + k, carried[0], first, WIDTH)
    sums += place * 4 * WIDTH + k
    for i in tl.static_range(4):
        tl.store(sums + i * WIDTH, carried[2][i], mask=mask)

"""The matrix scan in Triton, step by step: what goes into the chunks and comes out of them.

`prepare` takes the rotation out of keys and queries, and sums up the logarithms of the
decays; `finish` takes the gradients of these back to the arguments. Between them lie the
matrix products of `matrix_triton_forward` and `matrix_triton_backward`. The notation is that
of `matrix_chunks`: q, k, D; a rotation counts from the start of its chunk, or the last
reset in it.

A program holds BLOCK neighbouring eigenstates of one row and walks through one chunk.
Scratch memory has whole chunks, T' = n C steps, and is contiguous: rotated queries and keys
and what they were rotated by, [B, T', 2K], and the sums of squared decays [B, T', K] are float32, the sums of logarithms
[B, T', K] float64: differences of them must keep the digits of the smallest decay of a
chunk whose largest is 10^9 times as large. Steps after the end hold zeros, and decay nothing.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.recurrence.triton_arithmetic import (
    DYNAMIC_GAIN,
    NO_GAIN,
    decay_and_complement,
    input_gain_slope,
    load_terms,
    multiply,
    multiply_conjugate,
    sine_cosine,
    step_gain,
    tanh_pair,
)
from ten_dist.recurrence.triton_chunks import (
    dropped,
    load_pair,
    place_of_program,
    store_pair,
)

# Logarithms of what a reset and what a step multiplies the state with at the least: e^-200
# is 0 in float32, and 64 such steps are still told from a reset.
RESET = tl.constexpr(-1e5)
LEAST = tl.constexpr(-200.0)

# Arguments that change from call to call, without kernels of their own for some values.
NOT_SPECIALIZED = ["steps", "chunks"] + [
    f"{name}_batch" for name in ("key", "query", "modulation")
]


@triton.jit
def finite(x):
    """0 in the place of what is not finite, see `matrix_finite`."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _load_finite(pointer, mask, WIDTH: tl.constexpr):
    first, second = load_pair(pointer, mask, WIDTH)
    return finite(first.to(tl.float32)), finite(second.to(tl.float32))


@triton.jit
def _log_decay(logit):
    """log sigmoid(logit), to the last bits of float32 whatever the logit.

    log(1 + e) is 2 artanh(s) for s = e / (2 + e) <= 1/3, by its series.
    """
    e = tl.exp2(tl.abs(logit) * -1.4426950408889634)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 15 * s2 + 1.0 / 13
    series = series * s2 + 1.0 / 11
    series = series * s2 + 1.0 / 9
    series = series * s2 + 1.0 / 7
    series = series * s2 + 1.0 / 5
    series = series * s2 + 1.0 / 3
    series = series * s2 + 1.0
    return tl.minimum(logit, 0.0) - 2.0 * s * series


@triton.jit
def _step(terms, p, q):
    """Logarithm of the decay of one step; then cos phi, sin phi, rho, 1 - rho, tanh p, tanh q."""
    logit, cosine, sine, decay_range, rotation_range = terms[0]
    bounded_p, bounded_q = tanh_pair(p, q)
    logit += decay_range * bounded_p
    decay, complement = decay_and_complement(logit)
    turn_sine, turn_cosine = sine_cosine(rotation_range * bounded_q)
    turn = multiply((cosine, sine), (turn_cosine, turn_sine))
    log_decay = tl.maximum(_log_decay(logit), LEAST)
    return log_decay, (turn[0], turn[1], decay, complement, bounded_p, bounded_q)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def prepare(
    key,
    query,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    rotated_query,
    rotated_key,
    log_decays,
    squares,
    turns,
    steps,
    key_batch,
    key_step,
    query_batch,
    query_step,
    modulation_batch,
    modulation_step,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotated queries and keys, sums of logarithms, sums of squared decays up to the end of
    the chunk, and e^(i Theta), `turns`."""
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1).to(tl.int64)
    start = index * CHUNK
    count = tl.minimum(steps - start, CHUNK)
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    key += row * key_batch + start * key_step + k
    query += row * query_batch + start * query_step + k
    modulation += row * modulation_batch + start * modulation_step + k
    resets += row * steps + start
    place = row * tl.num_programs(1) + index
    pair_place = place * CHUNK * 2 * WIDTH + k
    place_of_sums = place * CHUNK * WIDTH + k
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    turn = (zero + 1.0, zero)
    total = zero.to(tl.float64)
    for i in range(CHUNK):
        exists = mask & (i < count)
        p, q = _load_finite(modulation + i * modulation_step, exists, WIDTH)
        log_decay, value = _step(terms, p, q)
        starts = tl.load(resets + i, mask=i < count, other=0) != 0
        log_decay = tl.where(starts, RESET, log_decay)
        total += tl.where(exists, log_decay, 0.0).to(tl.float64)
        step_turn = (tl.where(exists, value[0], 1.0), tl.where(exists, value[1], 0.0))
        turn = multiply(turn, step_turn)
        # No rounding of before a reset is left after it.
        turn = (tl.where(starts, 1.0, turn[0]), tl.where(starts, 0.0, turn[1]))
        read = _load_finite(query + i * query_step, exists, WIDTH)
        written = _load_finite(key + i * key_step, exists, WIDTH)
        read = multiply_conjugate(
            turn, (read[0].to(tl.float32), read[1].to(tl.float32))
        )
        written = multiply_conjugate(turn, written)
        if GAIN != NO_GAIN:
            gain = step_gain(terms, value, GAIN)
            written = (gain * written[0], gain * written[1])
        store_pair(rotated_query + pair_place + i * 2 * WIDTH, read, mask, WIDTH)
        store_pair(rotated_key + pair_place + i * 2 * WIDTH, written, mask, WIDTH)
        store_pair(turns + pair_place + i * 2 * WIDTH, turn, mask, WIDTH)
        tl.store(log_decays + place_of_sums + i * WIDTH, total, mask=mask)
    square = zero
    for j in range(CHUNK):
        i = CHUNK - 1 - j
        upto = tl.load(log_decays + place_of_sums + i * WIDTH, mask=mask, other=0.0)
        square = square * tl.exp(2.0 * (total - upto).to(tl.float32))
        square += tl.where(i < count, 1.0, 0.0)
        total = upto
        tl.store(squares + place_of_sums + i * WIDTH, square, mask=mask)


@triton.jit
def _energies(
    energies, entering, log_decays, mask, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """Put |S_t|^2 in the place of what each step of a chunk adds to it."""
    energy = tl.load(entering, mask=mask, other=0.0)
    earlier = energy.to(tl.float64) * 0.0
    for i in range(CHUNK):
        upto = tl.load(log_decays + i * WIDTH, mask=mask, other=0.0)
        energy = energy * tl.exp(2.0 * (upto - earlier).to(tl.float32))
        energy += tl.load(energies + i * WIDTH, mask=mask, other=0.0)
        tl.store(energies + i * WIDTH, energy, mask=mask)
        earlier = upto


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish(
    key,
    query,
    modulation,
    resets,
    alpha,
    omega,
    ranges,
    rotated_query,
    rotated_key,
    log_decays,
    turns,
    grad_rotated_query,
    grad_rotated_key,
    crossing,
    energies,
    entering_energies,
    grad_energy,
    grad_key,
    grad_query,
    grad_modulation,
    sums,
    steps,
    key_batch,
    key_step,
    query_batch,
    query_step,
    modulation_batch,
    modulation_step,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    GAIN: tl.constexpr,
    ENERGY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of key, query and modulation, contiguous, and parts of those of alpha, omega
    and the two ranges, `sums` [B, n, 4, K], to be added up.

    For z_t = conj(G_t) lambda_t S_(t-1), summed over N, from which they follow,

        z_t = z_(t+1) + conj(q_t) dq_t - k_t conj(dk_t) + 2 w |S_t|^2

    where z after the end of the chunk is `crossing` and z of a reset is 0.
    """
    row, k, mask = place_of_program(WIDTH, BLOCK)
    chunks = tl.num_programs(1)
    index = tl.program_id(1).to(tl.int64)
    start = index * CHUNK
    count = tl.minimum(steps - start, CHUNK)
    terms = load_terms(alpha, omega, ranges, k, mask, WIDTH)
    key += row * key_batch + start * key_step + k
    query += row * query_batch + start * query_step + k
    modulation += row * modulation_batch + start * modulation_step + k
    resets += row * steps + start
    place = row * chunks + index
    pair_place = place * CHUNK * 2 * WIDTH + k
    out_place = (row * steps + start) * 2 * WIDTH + k
    z = load_pair(crossing + place * 2 * WIDTH + k, mask, WIDTH)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    energy_weight = zero
    energies += place * CHUNK * WIDTH + k
    if ENERGY:
        energy_weight = 2.0 * tl.load(grad_energy + row * WIDTH + k, mask, other=0.0)
        _energies(
            energies,
            entering_energies + place * WIDTH + k,
            log_decays + place * CHUNK * WIDTH + k,
            mask,
            CHUNK,
            WIDTH,
        )
    sum_logit = zero
    sum_rotation = zero
    sum_decay_range = zero
    sum_rotation_range = zero
    for j in range(count):
        i = count - 1 - j
        p, q = _load_finite(modulation + i * modulation_step, mask, WIDTH)
        _, value = _step(terms, p, q)
        pairs = pair_place + i * 2 * WIDTH
        d_query = load_pair(grad_rotated_query + pairs, mask, WIDTH)
        d_key = load_pair(grad_rotated_key + pairs, mask, WIDTH)
        read = load_pair(rotated_query + pairs, mask, WIDTH)
        written = load_pair(rotated_key + pairs, mask, WIDTH)
        turn = load_pair(turns + pairs, mask, WIDTH)
        from_query = multiply_conjugate(read, d_query)
        from_key = multiply_conjugate(d_key, written)
        z = (z[0] + from_query[0] - from_key[0], z[1] + from_query[1] - from_key[1])
        if ENERGY:
            energy = tl.load(energies + i * WIDTH, mask=mask, other=0.0)
            z = (z[0] + energy_weight * energy, z[1])
        z = dropped(z, tl.load(resets + i) != 0, True)
        grad_logit = value[3] * z[0]
        grad_rotation = -z[1]

        out = out_place + i * 2 * WIDTH
        store_pair(grad_query + out, multiply(turn, d_query), mask, WIDTH)
        d_key = multiply(turn, d_key)
        if GAIN != NO_GAIN:
            gain = step_gain(terms, value, GAIN)
            inputs = _load_finite(key + i * key_step, mask, WIDTH)
            grad_gain = d_key[0] * inputs[0]
            grad_gain += d_key[1] * inputs[1]
            d_key = (gain * d_key[0], gain * d_key[1])
            if GAIN == DYNAMIC_GAIN:
                grad_logit += input_gain_slope(value[2], value[3]) * grad_gain
            else:
                # The static gain depends on alpha alone, not on the modulated logit.
                base = terms[1]
                sum_logit += input_gain_slope(base[2], base[3]) * grad_gain
        store_pair(grad_key + out, d_key, mask, WIDTH)

        sum_logit += grad_logit
        sum_rotation += grad_rotation
        bounded_p = value[4]
        bounded_q = value[5]
        sum_decay_range += bounded_p * grad_logit
        sum_rotation_range += bounded_q * grad_rotation
        grad_p = terms[0][3] * (1.0 - bounded_p * bounded_p) * grad_logit
        grad_q = terms[0][4] * (1.0 - bounded_q * bounded_q) * grad_rotation
        store_pair(grad_modulation + out, (grad_p, grad_q), mask, WIDTH)
    sums += place * 4 * WIDTH + k
    tl.store(sums, sum_logit, mask=mask)
    tl.store(sums + WIDTH, sum_rotation, mask=mask)
    tl.store(sums + 2 * WIDTH, sum_decay_range, mask=mask)
    tl.store(sums + 3 * WIDTH, sum_rotation_range, mask=mask)

"""The matrix scan in Triton, backward: chunk after chunk against time.

With o' the gradient of the output times (K/H)^-1/2, w that of the energy, and R that of the
state after a chunk, without its rotation, the gradient of the state S_t within it is

    G_t = D(t, C) R + sum_(s >= t) D(t, s) (q_s o'_s^T + 2 w S_s)

and the sum over the S_s is E_t S_t + sum_(s > t) D(t, s) E_s k_s v_s^T, where E_t is the sum
of D(t, s)^2: `squares`. So the energy is read like an output, by queries 2 w E_t k_t, of
which the gradients are the values. Gradients of decays and rotations follow from those of
keys and queries, and conj(R) S at the end of the chunk, in `finish`.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.matrix_recurrence.matrix_triton_forward import (
    NOT_SPECIALIZED,
    added,
    chunk_turn,
    energy_added,
    entering_square,
    level_decay,
    load_decays,
    load_halves,
    load_values,
    mixed,
    mixed_transposed,
    place_of_head,
    scaled,
    scores_between,
    store_halves,
    total_over,
    turned,
)
from ten_dist.matrix_recurrence.matrix_triton_steps import finite


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def scan_backward(
    gradient,
    grad_final,
    grad_energy,
    value,
    rotated_query,
    rotated_key,
    log_decays,
    squares,
    turns,
    states,
    grad_query,
    grad_key,
    grad_value,
    grad_initial,
    crossing,
    energies,
    entering_energies,
    scale,
    steps,
    chunks,
    gradient_batch,
    gradient_step,
    value_batch,
    value_step,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    STATE_DIM: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ENERGY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of value and initial state, and of each block of N, to be added up:

    grad_query, grad_key [blocks, B, T', 2K], of q and k; crossing [blocks, B, n, 2K], conj(R) S
    at the end of each chunk; with ENERGY, energies [blocks, B, T', K], what each step adds to
    |S|^2, and entering_energies [blocks, B, n, K], |S|^2 at the start of each chunk.
    """
    row, k, has_k, n, has_n, head = place_of_head(
        NUM_HEADS, WIDTH // NUM_HEADS, STATE_DIM, BLOCK_P, BLOCK_N
    )
    places = k[:, None] * STATE_DIM + n[None, :]
    has_place = has_k[:, None] & has_n[None, :]
    half = WIDTH * STATE_DIM
    value += row * value_batch + head * STATE_DIM
    gradient += row * gradient_batch + head * STATE_DIM
    grad_value += row * steps * NUM_HEADS * STATE_DIM + head * STATE_DIM
    rows_of_batch = tl.num_programs(0) // NUM_HEADS
    t = tl.arange(0, CHUNK)
    same = t[:, None] == t[None, :]
    upstream = (
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
    )
    if HAS_FINAL:
        upstream = load_halves(grad_final + row * 2 * half + places, has_place, half)
    weight = tl.full((BLOCK_P,), 0.0, tl.float32)
    if ENERGY:
        weight = 2.0 * tl.load(grad_energy + row * WIDTH + k, mask=has_k, other=0.0)
    place = row * chunks + chunks - 1
    # Where this block of N puts what is added up with the others.
    shared = (tl.program_id(1) * rows_of_batch + row) * chunks + chunks - 1
    start = (row * 0 + chunks - 1) * CHUNK
    states += (row * (chunks + 1) + chunks - 1) * 2 * half + places
    for _ in range(chunks):
        values = finite(load_values(value, start, steps, value_step, n, has_n, CHUNK))
        grads = load_values(gradient, start, steps, gradient_step, n, has_n, CHUNK)
        grads *= scale
        pairs = t[:, None] * 2 * WIDTH + k[None, :]
        in_pairs = pairs + place * CHUNK * 2 * WIDTH
        query = load_halves(rotated_query + in_pairs, has_k[None, :], WIDTH)
        key = load_halves(rotated_key + in_pairs, has_k[None, :], WIDTH)
        logs = log_decays + place * CHUNK * WIDTH
        before, behind, total = load_decays(logs, k, has_k, CHUNK, WIDTH)

        # conj(R) S does not depend on the rotation: both have that of the end here.
        state = load_halves(states + 2 * half, has_place, half)
        real = total_over(upstream[0] * state[0] + upstream[1] * state[1], 1)
        imaginary = total_over(upstream[0] * state[1] - upstream[1] * state[0], 1)
        out = crossing + shared * 2 * WIDTH + k
        store_halves(out, (real, imaginary), has_k, WIDTH)
        turn = chunk_turn(turns, place, k, has_k, CHUNK, WIDTH)
        upstream = turned(upstream, (turn[0], -turn[1]))
        state = load_halves(states, has_place, half)

        products = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        diagonal = total_over(grads * values, 1)[:, None]
        across = (tl.trans(state[0]), tl.trans(state[1]))
        d_query = scaled(mixed(grads, across, PRECISION), before)
        d_query = added(d_query, scaled(key, diagonal))
        across = (tl.trans(upstream[0]), tl.trans(upstream[1]))
        d_key = scaled(mixed(values, across, PRECISION), behind)
        d_key = added(d_key, scaled(query, diagonal))
        diagonal = total_over(query[0] * key[0] + query[1] * key[1], 1)
        # Transposed: the scores of t for j at [j, t].
        scores = tl.where(same, diagonal[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            decay, apart = level_decay(logs, k, has_k, level, CHUNK, WIDTH)
            read = scaled(query, decay)
            written = scaled(key, decay)
            weights = tl.where(apart, products, 0.0)
            d_query = added(d_query, scaled(mixed(weights, written, PRECISION), decay))
            back = mixed(tl.trans(weights), read, PRECISION)
            d_key = added(d_key, scaled(back, decay))
            between = scores_between(written, read, PRECISION)
            scores += tl.where(tl.trans(apart), between, 0.0)
        d_value = tl.dot(scores, grads, input_precision=PRECISION)
        written = scaled(key, behind)
        d_value = tl.dot(written[0], upstream[0], d_value, input_precision=PRECISION)
        d_value = tl.dot(written[1], upstream[1], d_value, input_precision=PRECISION)
        upstream = scaled(upstream, total[:, None])
        back = mixed_transposed(scaled(query, before), grads, PRECISION)
        upstream = added(upstream, back)

        if ENERGY:
            sums = t[:, None] * WIDTH + k[None, :]
            square = tl.load(
                squares + place * CHUNK * WIDTH + sums, mask=has_k[None, :], other=0.0
            )
            reader = scaled(key, square * weight[None, :])
            products = tl.dot(values, tl.trans(values), input_precision=PRECISION)
            across = (tl.trans(state[0]), tl.trans(state[1]))
            met = scaled(mixed(values, across, PRECISION), before)
            diagonal = total_over(reader[0] * key[0] + reader[1] * key[1], 1)
            scores = tl.where(same, diagonal[:, None], 0.0)
            for level in tl.static_range(LEVELS):
                decay, apart = level_decay(logs, k, has_k, level, CHUNK, WIDTH)
                read = scaled(reader, decay)
                written = scaled(key, decay)
                weights = tl.where(apart, products, 0.0)
                met = added(met, scaled(mixed(weights, written, PRECISION), decay))
                back = mixed(tl.trans(weights), read, PRECISION)
                d_key = added(d_key, scaled(back, decay))
                between = tl.where(apart, scores_between(read, written, PRECISION), 0.0)
                # A later step reads an earlier value, and is an earlier gradient's value.
                scores += between + tl.trans(between)
            d_value = tl.dot(scores, values, d_value, input_precision=PRECISION)
            read = scaled(reader, before)
            d_value = tl.dot(read[0], state[0], d_value, input_precision=PRECISION)
            d_value = tl.dot(read[1], state[1], d_value, input_precision=PRECISION)
            norms = total_over(values * values, 1)[:, None]
            own = added(met, scaled(key, norms))
            d_key = added(d_key, scaled(own, square * weight[None, :]))
            tl.store(
                energies + shared * CHUNK * WIDTH + sums,
                energy_added(key, met, values),
                mask=has_k[None, :],
            )
            norms = total_over(state[0] * state[0] + state[1] * state[1], 1)
            tl.store(entering_energies + shared * WIDTH + k, norms, mask=has_k)
            first = squares + place * CHUNK * WIDTH + k
            kept = weight * entering_square(logs + k, first, has_k)
            upstream = added(upstream, scaled(state, kept[:, None]))
            back = mixed_transposed(read, values, PRECISION)
            upstream = added(upstream, back)

        out_pairs = pairs + shared * CHUNK * 2 * WIDTH
        store_halves(grad_query + out_pairs, d_query, has_k[None, :], WIDTH)
        store_halves(grad_key + out_pairs, d_key, has_k[None, :], WIDTH)
        rows = start + t
        tl.store(
            grad_value + rows[:, None] * NUM_HEADS * STATE_DIM + n[None, :],
            d_value.to(grad_value.dtype.element_ty),
            mask=(rows < steps)[:, None] & has_n[None, :],
        )
        place -= 1
        shared -= 1
        start -= CHUNK
        states -= 2 * half
    store_halves(grad_initial + row * 2 * half + places, upstream, has_place, half)

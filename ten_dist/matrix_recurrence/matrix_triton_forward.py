"""The matrix scan in Triton, forward: chunk after chunk in matrix products.

A program holds the state of one head of one row, P eigenstates by BLOCK_N of their N
numbers, in float32, and takes it through the chunks. `matrix_triton_steps` has what it
reads, and `matrix_chunks` the algebra. P and N are filled up with zeros to powers of two.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.matrix_recurrence.matrix_triton_steps import finite

# Arguments that change from call to call, without kernels of their own for some values.
NOT_SPECIALIZED = ["steps", "chunks", "value_batch", "gradient_batch"]


@triton.jit
def total_over(x, AXIS: tl.constexpr):
    """The sum over one dimension. `tl.sum` itself is interpreted only where Triton was
    imported to interpret, and tests decide that later."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@triton.jit
def place_of_head(
    NUM_HEADS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row (int64); eigenstates of the layer [BLOCK_P] and values of the head [BLOCK_N], each
    with what exists of it; and the head."""
    program = tl.program_id(0)
    head = program % NUM_HEADS
    p = tl.arange(0, BLOCK_P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (program // NUM_HEADS).to(tl.int64)
    return row, head * PER_HEAD + p, p < PER_HEAD, n, n < STATE_DIM, head


@triton.jit
def load_halves(pointer, mask, apart):
    """Real and imaginary part, `apart` elements from each other."""
    real = tl.load(pointer, mask=mask, other=0.0)
    return real, tl.load(pointer + apart, mask=mask, other=0.0)


@triton.jit
def store_halves(pointer, pair, mask, apart):
    tl.store(pointer, pair[0], mask=mask)
    tl.store(pointer + apart, pair[1], mask=mask)


@triton.jit
def load_values(pointer, start, steps, step, n, exists, CHUNK: tl.constexpr):
    """[CHUNK, BLOCK_N] rows from step `start` on, zeros after the end, in float32."""
    rows = start + tl.arange(0, CHUNK)
    mask = (rows < steps)[:, None] & exists[None, :]
    rows = tl.load(pointer + rows[:, None] * step + n[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def load_decays(log_decays, k, exists, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """D from the start of the chunk to each step, from each step to its end, both
    [CHUNK, BLOCK_P], and from the start to the end, [BLOCK_P]."""
    rows = tl.arange(0, CHUNK)[:, None] * WIDTH + k[None, :]
    upto = tl.load(log_decays + rows, mask=exists[None, :], other=0.0)
    last = log_decays + (CHUNK - 1) * WIDTH + k
    total = tl.load(last, mask=exists, other=0.0)
    behind = tl.exp((total[None, :] - upto).to(tl.float32))
    return tl.exp(upto.to(tl.float32)), behind, tl.exp(total.to(tl.float32))


@triton.jit
def chunk_turn(turns, place, k, exists, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """The rotation that a whole chunk leaves its state with, complex [BLOCK_P]."""
    last = (place + 1) * CHUNK - 1
    return load_halves(turns + last * 2 * WIDTH + k, exists, WIDTH)


@triton.jit
def level_decay(
    log_decays, k, exists, LEVEL: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """What belongs to each step where blocks of 2^LEVEL steps are taken apart in the middle.

    Returns:
        decay: [CHUNK, BLOCK_P], D up to the middle, or from it on.
        apart: [CHUNK, CHUNK], whether t is in the second and j in the first of two blocks.
    """
    t = tl.arange(0, CHUNK)
    block = t >> LEVEL
    middle = ((block >> 1) << (LEVEL + 1)) + (1 << LEVEL) - 1
    places = t[:, None] * WIDTH + k[None, :]
    upto = tl.load(log_decays + places, mask=exists[None, :], other=0.0)
    places = middle[:, None] * WIDTH + k[None, :]
    upto_middle = tl.load(log_decays + places, mask=exists[None, :], other=0.0)
    # Up to the middle is later than a step before it: either way the sum of what lies between.
    between = tl.minimum(upto - upto_middle, upto_middle - upto)
    apart = ((block & 1) == 1)[:, None] & ((block - 1)[:, None] == block[None, :])
    return tl.exp(between.to(tl.float32)), apart


@triton.jit
def scaled(pair, factor):
    return pair[0] * factor, pair[1] * factor


@triton.jit
def scores_between(a, b, PRECISION: tl.constexpr):
    """[M, R], Re sum_k conj(a) b of pairs [M, P] and [R, P]."""
    real = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    return tl.dot(a[1], tl.trans(b[1]), real, input_precision=PRECISION)


@triton.jit
def mixed(weights, pair, PRECISION: tl.constexpr):
    """weights [M, R] times both halves of a pair [R, P]."""
    return (
        tl.dot(weights, pair[0], input_precision=PRECISION),
        tl.dot(weights, pair[1], input_precision=PRECISION),
    )


@triton.jit
def mixed_transposed(pair, weights, PRECISION: tl.constexpr):
    """Both halves of a pair [R, P], transposed, times weights [R, N]."""
    return (
        tl.dot(tl.trans(pair[0]), weights, input_precision=PRECISION),
        tl.dot(tl.trans(pair[1]), weights, input_precision=PRECISION),
    )


@triton.jit
def added(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def turned(pair, turn):
    """Both halves [P, N] times complex numbers [P]."""
    real = turn[0][:, None]
    imaginary = turn[1][:, None]
    return (
        pair[0] * real - pair[1] * imaginary,
        pair[0] * imaginary + pair[1] * real,
    )


@triton.jit
def energy_added(key, met, values):
    """|S_t|^2 less what is left in it of |S_(t-1)|^2, [CHUNK, BLOCK_P]."""
    squares = total_over(values * values, 1)[:, None]
    real = key[0] * (2.0 * met[0] + key[0] * squares)
    return real + key[1] * (2.0 * met[1] + key[1] * squares)


@triton.jit
def after_chunk(state, key, behind, total, values, PRECISION: tl.constexpr):
    """The state after a chunk, without its rotation, from that before it."""
    written = mixed_transposed(scaled(key, behind), values, PRECISION)
    return added(scaled(state, total[:, None]), written)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def chunk_states(
    value,
    rotated_key,
    log_decays,
    turns,
    initial,
    states,
    steps,
    chunks,
    value_batch,
    value_step,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    STATE_DIM: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """States at the borders of the chunks, [B, n + 1, 2, K, N]."""
    row, k, has_k, n, has_n, head = place_of_head(
        NUM_HEADS, WIDTH // NUM_HEADS, STATE_DIM, BLOCK_P, BLOCK_N
    )
    places = k[:, None] * STATE_DIM + n[None, :]
    has_place = has_k[:, None] & has_n[None, :]
    half = WIDTH * STATE_DIM
    value += row * value_batch + head * STATE_DIM
    rows = tl.arange(0, CHUNK)[:, None] * 2 * WIDTH + k[None, :]
    state = (
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
    )
    if HAS_INITIAL:
        state = load_halves(initial + row * 2 * half + places, has_place, half)
        state = (finite(state[0]), finite(state[1]))
    states += row * (chunks + 1) * 2 * half
    store_halves(states + places, state, has_place, half)
    place = row * chunks
    start = row * 0
    for _ in range(chunks):
        values = finite(load_values(value, start, steps, value_step, n, has_n, CHUNK))
        pairs = rows + place * CHUNK * 2 * WIDTH
        key = load_halves(rotated_key + pairs, has_k[None, :], WIDTH)
        _, behind, total = load_decays(
            log_decays + place * CHUNK * WIDTH, k, has_k, CHUNK, WIDTH
        )
        state = after_chunk(state, key, behind, total, values, PRECISION)
        turn = chunk_turn(turns, place, k, has_k, CHUNK, WIDTH)
        state = turned(state, turn)
        states += 2 * half
        store_halves(states + places, state, has_place, half)
        place += 1
        start += CHUNK


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def scan_forward(
    value,
    rotated_query,
    rotated_key,
    log_decays,
    squares,
    turns,
    initial,
    output,
    final,
    energy,
    scale,
    steps,
    chunks,
    value_batch,
    value_step,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    STATE_DIM: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output [B, T, H N], final state [B, 2, K, N], and energy [B, blocks of N, K]."""
    row, k, has_k, n, has_n, head = place_of_head(
        NUM_HEADS, WIDTH // NUM_HEADS, STATE_DIM, BLOCK_P, BLOCK_N
    )
    places = k[:, None] * STATE_DIM + n[None, :]
    has_place = has_k[:, None] & has_n[None, :]
    half = WIDTH * STATE_DIM
    value += row * value_batch + head * STATE_DIM
    output += row * steps * NUM_HEADS * STATE_DIM + head * STATE_DIM
    steps_of_chunk = tl.arange(0, CHUNK)
    state = (
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
        tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32),
    )
    if HAS_INITIAL:
        state = load_halves(initial + row * 2 * half + places, has_place, half)
        state = (finite(state[0]), finite(state[1]))
    sum_energy = tl.full((BLOCK_P,), 0.0, tl.float32)
    place = row * chunks
    start = row * 0
    for _ in range(chunks):
        values = finite(load_values(value, start, steps, value_step, n, has_n, CHUNK))
        pairs = steps_of_chunk[:, None] * 2 * WIDTH + k[None, :]
        pairs += place * CHUNK * 2 * WIDTH
        query = load_halves(rotated_query + pairs, has_k[None, :], WIDTH)
        key = load_halves(rotated_key + pairs, has_k[None, :], WIDTH)
        logs = log_decays + place * CHUNK * WIDTH
        before, behind, total = load_decays(logs, k, has_k, CHUNK, WIDTH)

        products = tl.dot(values, tl.trans(values), input_precision=PRECISION)
        diagonal = total_over(query[0] * key[0] + query[1] * key[1], 1)
        same = steps_of_chunk[:, None] == steps_of_chunk[None, :]
        scores = tl.where(same, diagonal[:, None], 0.0)
        met = (
            before * tl.dot(values, tl.trans(state[0]), input_precision=PRECISION),
            before * tl.dot(values, tl.trans(state[1]), input_precision=PRECISION),
        )
        for level in tl.static_range(LEVELS):
            decay, apart = level_decay(logs, k, has_k, level, CHUNK, WIDTH)
            decayed = scaled(key, decay)
            between = scores_between(scaled(query, decay), decayed, PRECISION)
            scores += tl.where(apart, between, 0.0)
            weights = tl.where(apart, products, 0.0)
            met = added(met, scaled(mixed(weights, decayed, PRECISION), decay))

        result = tl.dot(scores, values, input_precision=PRECISION)
        reading = scaled(query, before)
        result = tl.dot(reading[0], state[0], result, input_precision=PRECISION)
        result = tl.dot(reading[1], state[1], result, input_precision=PRECISION)
        rows = start + steps_of_chunk
        tl.store(
            output + rows[:, None] * NUM_HEADS * STATE_DIM + n[None, :],
            (scale * result).to(output.dtype.element_ty),
            mask=(rows < steps)[:, None] & has_n[None, :],
        )

        sums = steps_of_chunk[:, None] * WIDTH + k[None, :] + place * CHUNK * WIDTH
        square = tl.load(squares + sums, mask=has_k[None, :], other=0.0)
        sum_energy += total_over(square * energy_added(key, met, values), 0)
        entering = total_over(state[0] * state[0] + state[1] * state[1], 1)
        first = squares + place * CHUNK * WIDTH + k
        sum_energy += entering * entering_square(logs + k, first, has_k)
        state = after_chunk(state, key, behind, total, values, PRECISION)
        turn = chunk_turn(turns, place, k, has_k, CHUNK, WIDTH)
        state = turned(state, turn)
        place += 1
        start += CHUNK
    store_halves(final + row * 2 * half + places, state, has_place, half)
    tl.store(
        energy + (row * tl.num_programs(1) + tl.program_id(1)) * WIDTH + k,
        sum_energy,
        mask=has_k,
    )


@triton.jit
def entering_square(first_log, first_square, exists):
    """Sum over the chunk of the squared decay of what enters it, [BLOCK_P]."""
    log_decay = tl.load(first_log, mask=exists, other=0.0).to(tl.float32)
    square = tl.load(first_square, mask=exists, other=0.0)
    return square * tl.exp(2.0 * log_decay)

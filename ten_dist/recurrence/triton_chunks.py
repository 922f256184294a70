"""Chunks of the eigenstate scan in Triton, and what crosses from one to the next.

Time is cut into chunks. `reduce` takes each chunk from a zero state to its local end
state, beside the product of its eigenvalues; `carry` runs over these, one pair a chunk,
and leaves the state that enters each chunk; `scan` reads the inputs again and writes the
states. Where there are many chunks, `compose` makes groups of them first, which are
carried in the same way. `triton_forward` and `triton_backward` have the reduce and the
scan; this module has what works for both directions of time.

A program holds BLOCK neighbouring eigenstates of one row of the batch and walks through
one chunk with their states in float32 registers. UNROLL steps are read before the first
of them is used: the recurrence is sequential, its reads need not be.

In rows of 2K the first half are real parts (or p), the second imaginary parts (or q).
Tensors between the kernels are float32 and contiguous: product, local and entering
[B, chunks, 2K]. K is the constant WIDTH; batch, lengths and strides are ordinary
arguments, so that a new length or batch compiles nothing.

A reset drops what is carried: the product of a chunk that holds one is zero.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ten_dist.recurrence.triton_arithmetic import multiply

# Types of variables are comments in kernels: Triton does not compile annotations.

# Arguments that change from call to call, without kernels of their own for some values.
SIZES = ["steps", "chunk", "chunks", "group"]


@triton.jit
def place_of_program(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Row of the batch (int64), its eigenstates [BLOCK], and which of them exist.

    Blocks of one row follow each other: programs that run at the same time read
    neighbouring columns.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    k = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), k, k < WIDTH


@triton.jit
def load_pair(pointer, mask, WIDTH: tl.constexpr):
    first = tl.load(pointer, mask=mask, other=0.0)
    return first, tl.load(pointer + WIDTH, mask=mask, other=0.0)


@triton.jit
def moved(pointers, steps, count):
    """The pointers, each moved by `count` of its own steps."""
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (pointers[i] + count * steps[i],)
    return result


@triton.jit
def load_rows(pointer, step, mask, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Both halves of COUNT rows, `step` elements from one to the next."""
    rows = ()  # type: tuple
    for i in tl.static_range(COUNT):
        rows = rows + (load_pair(pointer + i * step, mask, WIDTH),)
    return rows


@triton.jit
def load_states_before(
    states,
    initial,
    step,
    mask,
    WIDTH: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    COUNT: tl.constexpr,
):
    """c_{t-1} for t = step, step - 1, ...; `states` points to row step - 1."""
    rows = ()  # type: tuple
    for i in tl.static_range(COUNT):
        pair = load_pair(states - i * 2 * WIDTH, mask & (step > i), WIDTH)
        if HAS_INITIAL:
            first = load_pair(initial, mask & (step == i), WIDTH)
            pair = (
                pair[0].to(tl.float32) + first[0],
                pair[1].to(tl.float32) + first[1],
            )
        rows = rows + (pair,)
    return rows


@triton.jit
def load_flags(pointer, step, FLAGGED: tl.constexpr, COUNT: tl.constexpr):
    """Whether there is a reset at COUNT steps; never where FLAGGED is not set."""
    flags = ()  # type: tuple
    for i in tl.static_range(COUNT):
        if FLAGGED:
            flags = flags + (tl.load(pointer + i * step) != 0,)
        else:
            flags = flags + (False,)
    return flags


@triton.jit
def dropped(pair, flag, FLAGGED: tl.constexpr):
    """Zero where the flag is set, else the pair."""
    if FLAGGED:
        pair = (tl.where(flag, 0.0, pair[0]), tl.where(flag, 0.0, pair[1]))
    return pair


@triton.jit
def store_pair(pointer, pair, mask, WIDTH: tl.constexpr):
    tl.store(pointer, pair[0].to(pointer.dtype.element_ty), mask=mask)
    tl.store(pointer + WIDTH, pair[1].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _carry_steps(carried, rows, step, mask, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    product, local, entering = rows
    products = load_rows(product, step, mask, WIDTH, COUNT)
    locals_ = load_rows(local, step, mask, WIDTH, COUNT)
    for i in tl.static_range(COUNT):
        store_pair(entering + i * step, carried, mask, WIDTH)
        carried = multiply(products[i], carried)
        carried = (carried[0] + locals_[i][0], carried[1] + locals_[i][1])
    return carried


@triton.jit(do_not_specialize=SIZES)
def carry(
    product,
    local,
    entering_group,
    entering,
    chunks,
    group,
    WIDTH: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """What enters each chunk, from what enters its group [B, groups, 2K], or zero.

    With REVERSED it enters at the end of each chunk, and the last chunk comes first.
    """
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    first = index * group
    count = tl.minimum(chunks - first, group)
    step = 2 * WIDTH
    if REVERSED:
        first += count - 1
        step = -step
    place = (row * chunks + first) * 2 * WIDTH + k
    rows = (product + place, local + place, entering + place)
    strides = (step, step, step)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    carried = (zero, zero)
    if HAS_ENTERING:
        place = row * tl.num_programs(1) + index
        carried = load_pair(entering_group + place * 2 * WIDTH + k, mask, WIDTH)
    for _ in range(count // UNROLL):
        carried = _carry_steps(carried, rows, step, mask, WIDTH, UNROLL)
        rows = moved(rows, strides, UNROLL)
    for _ in range(count % UNROLL):
        carried = _carry_steps(carried, rows, step, mask, WIDTH, 1)
        rows = moved(rows, strides, 1)


@triton.jit
def _compose_steps(carried, rows, step, mask, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    product, local = rows
    products = load_rows(product, step, mask, WIDTH, COUNT)
    locals_ = load_rows(local, step, mask, WIDTH, COUNT)
    state, total = carried
    for i in tl.static_range(COUNT):
        state = multiply(products[i], state)
        state = (state[0] + locals_[i][0], state[1] + locals_[i][1])
        total = multiply(products[i], total)
    return state, total


@triton.jit(do_not_specialize=SIZES)
def compose(
    product,
    local,
    group_product,
    group_local,
    chunks,
    group,
    WIDTH: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Product and local end state [B, groups, 2K] of groups of chunks."""
    row, k, mask = place_of_program(WIDTH, BLOCK)
    index = tl.program_id(1)
    first = index * group
    count = tl.minimum(chunks - first, group)
    step = 2 * WIDTH
    if REVERSED:
        first += count - 1
        step = -step
    place = (row * chunks + first) * 2 * WIDTH + k
    rows = (product + place, local + place)
    strides = (step, step)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    carried = ((zero, zero), (zero + 1.0, zero))
    for _ in range(count // UNROLL):
        carried = _compose_steps(carried, rows, step, mask, WIDTH, UNROLL)
        rows = moved(rows, strides, UNROLL)
    for _ in range(count % UNROLL):
        carried = _compose_steps(carried, rows, step, mask, WIDTH, 1)
        rows = moved(rows, strides, 1)
    place = (row * tl.num_programs(1) + index) * 2 * WIDTH + k
    store_pair(group_local + place, carried[0], mask, WIDTH)
    store_pair(group_product + place, carried[1], mask, WIDTH)

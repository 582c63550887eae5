"""Block attention, forward: whole frames see whole frames by a rule, of which the kernel computes what a tile of rows may see.

A row sees up to three runs of tokens (`query_runs`), and of the memory every frame as a run of its own. Over the rows of a tile a
run widens at both ends: key blocks that every row sees need no mask, blocks at the ends compare columns with the row's own ends,
and no other block is touched; of remembered frames all blocks are masked. Tokens per frame need not divide by a block size; a tile
never lies across the two halves of a doubled sequence.

Shapes: B batch, N heads, Q tokens of the sequence, E head width; M rows of a tile, C columns of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worldmodel.kernels.triton_tiles import load_tile, softmax_start, softmax_step


@triton.jit
def chunk_of(frame, frames, CHUNK: tl.constexpr, FIRST: tl.constexpr):
    """First frame of the chunk of `frame` and the frame behind it; a chunk may be cut by the end of the clip."""
    start = tl.where(frame < FIRST, 0, FIRST + tl.maximum(frame - FIRST, 0) // CHUNK * CHUNK)
    return start, tl.minimum(tl.where(frame < FIRST, FIRST, start + CHUNK), frames)


@triton.jit
def query_runs(
    row, noisy, frames, TOKENS: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr, REACH: tl.constexpr, SINK: tl.constexpr
):
    """Key tokens that query tokens `row` of one half see: [0, sink), [low, high) and, in the noisy half, [own, own_end).

    REACH: frames seen behind the sink, counted back from the end of the own chunk; below zero: all.
    """
    start, end = chunk_of(tl.minimum(row // TOKENS, frames - 1), frames, CHUNK, FIRST)
    high = tl.where(noisy, start, end)
    sink = start * 0
    low = start * 0
    if REACH >= 0:
        sink = tl.minimum(SINK, high)
        low = tl.minimum(tl.maximum(end - REACH, sink), high)
    own = tl.where(noisy, frames + start, 0)
    own_end = tl.where(noisy, frames + end, 0)
    return sink * TOKENS, low * TOKENS, high * TOKENS, own * TOKENS, own_end * TOKENS


@triton.jit
def memory_run(sink, low, high, TOKENS: tl.constexpr, MEMORY: tl.constexpr, EVERY: tl.constexpr):
    """What rows remember that see [0, sink), [low, high) tokens: from and to, and over all rows of the tile the first remembered
    frame and how many there are, every EVERY-th."""
    since = tl.maximum(low - MEMORY * EVERY * TOKENS, sink)
    first = tl.cdiv(tl.min(since, 0), EVERY * TOKENS) * EVERY
    return since, first, tl.maximum(tl.cdiv(tl.max(low, 0), TOKENS * EVERY) - first // EVERY, 0)


@triton.jit
def memory_block(index, first, since, low, col, TOKENS: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """The block with this index over the remembered frames: its first token, and which of its columns each row sees."""
    blocks: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    frame, inner = (first + index // blocks * EVERY) * TOKENS, index % blocks * BLOCK
    seen = (frame >= since) & (frame < low)
    return frame + inner, seen[:, None] & (inner + col < TOKENS)[None]


@triton.jit
def run_blocks(low, high, BLOCK: tl.constexpr):
    """How a tile walks a run: its first token, then how many blocks need a mask, need none, and again need one."""
    begin, finish = tl.min(low, 0), tl.max(high, 0)
    head = tl.maximum(tl.cdiv(tl.max(low, 0) - begin, BLOCK), 0)
    free = tl.maximum(tl.min(high, 0) - begin - head * BLOCK, 0) // BLOCK
    tail = tl.maximum(tl.cdiv(finish - begin - (head + free) * BLOCK, BLOCK), 0)
    return begin, head, free, tail


@triton.jit
def run_place(index, begin, head, free, BLOCK: tl.constexpr):
    """First token of the masked block with this index: those before the free blocks, then those behind them."""
    return begin + tl.where(index < head, index, index + free) * BLOCK


@triton.jit
def free_block(index, begin, ahead, free, begin_2, ahead_2, BLOCK: tl.constexpr):
    """First token of the unmasked block with this index, over two runs."""
    return tl.where(index < free, begin + (ahead + index) * BLOCK, begin_2 + (ahead_2 + index - free) * BLOCK)


@triton.jit
def edge_block(
    index, begin, ahead, free, tail, low, high, begin_2, ahead_2, free_2, tail_2, low_2, high_2, sink, BLOCK: tl.constexpr
):
    """The masked block with this index, over two runs and then the sink: its first token, and what each row sees, from and to."""
    second, third = index - ahead - tail, index - ahead - tail - ahead_2 - tail_2
    start = tl.where(second < 0, run_place(index, begin, ahead, free, BLOCK), run_place(second, begin_2, ahead_2, free_2, BLOCK))
    start = tl.where(third < 0, start, third * BLOCK)
    since = tl.where(second < 0, low, tl.where(third < 0, low_2, 0))
    until = tl.where(second < 0, high, tl.where(third < 0, high_2, sink))
    return start, since, until


@triton.jit
def half_tile(tile, half_tokens, ROWS: tl.constexpr):
    """Of a tile, counted over both halves: whether it is noisy, its rows in its half, their tokens, and which of them exist."""
    tiles = tl.cdiv(half_tokens, ROWS)
    noisy = tile >= tiles
    row = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    return noisy, row, (row + tl.where(noisy, half_tokens, 0)).to(tl.int64), row < half_tokens


@triton.jit(do_not_specialize=["frames"])
def block_forward_kernel(
    q,
    k,
    v,
    out,
    logs,
    scale,
    frames,
    heads,
    q_b,
    q_n,
    q_s,
    k_b,
    k_n,
    k_s,
    v_b,
    v_n,
    v_s,
    o_b,
    o_n,
    o_s,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    REACH: tl.constexpr,
    SINK: tl.constexpr,
    MEMORY: tl.constexpr,
    EVERY: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of one half, batch x head). Writes the result and the base-2 log-sum-exp (B,N,Q) for the backward pass."""
    half_tokens = frames * TOKENS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late frames see most: they start first
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    noisy, row, token, live = half_tile(tile, half_tokens, ROWS)
    col, e = tl.arange(0, COLS), tl.arange(0, WIDTH)
    inside = e < HEAD
    q_tile = tl.load(q + batch * q_b + head * q_n + token[:, None] * q_s + e[None], live[:, None] & inside[None], other=0.0)
    sink, low, high, own, own_end = query_runs(row, noisy, frames, TOKENS, CHUNK, FIRST, REACH, SINK)
    begin, ahead, free, tail = run_blocks(low, high, COLS)
    own_begin, own_ahead, own_free, own_tail = run_blocks(own, own_end, COLS)
    sinks = tl.cdiv(tl.max(sink, 0), COLS)
    k_base, v_base = k + batch * k_b + head * k_n, v + batch * v_b + head * v_n
    k_offset, v_offset = col[:, None] * k_s + e[None], col[:, None] * v_s + e[None]
    acc, top, total = softmax_start(ROWS, WIDTH)
    for i in range(0, free + own_free):
        start = free_block(i, begin, ahead, free, own_begin, own_ahead, COLS)
        k_tile = load_tile(k_base, start, k_s, k_offset, inside, None, False)
        v_tile = load_tile(v_base, start, v_s, v_offset, inside, None, False)
        acc, top, total = softmax_step(q_tile, k_tile, v_tile, acc, top, total, scale, None, False, False, PRECISION)
    for i in range(0, ahead + tail + own_ahead + own_tail + sinks):
        start, since, until = edge_block(
            i, begin, ahead, free, tail, low, high, own_begin, own_ahead, own_free, own_tail, own, own_end, sink, COLS
        )
        at = start + col
        k_tile = load_tile(k_base, start, k_s, k_offset, inside, at < half_tokens * HALVES, True)
        v_tile = load_tile(v_base, start, v_s, v_offset, inside, at < half_tokens * HALVES, True)
        visible = (at[None] >= since[:, None]) & (at[None] < until[:, None])
        acc, top, total = softmax_step(q_tile, k_tile, v_tile, acc, top, total, scale, visible, True, True, PRECISION)
    if MEMORY > 0:
        back, first, count = memory_run(sink, low, high, TOKENS, MEMORY, EVERY)
        for i in range(0, count * ((TOKENS + COLS - 1) // COLS)):
            start, visible = memory_block(i, first, back, low, col, TOKENS, EVERY, COLS)
            k_tile = load_tile(k_base, start, k_s, k_offset, inside, start + col < half_tokens * HALVES, True)
            v_tile = load_tile(v_base, start, v_s, v_offset, inside, start + col < half_tokens * HALVES, True)
            acc, top, total = softmax_step(q_tile, k_tile, v_tile, acc, top, total, scale, visible, True, True, PRECISION)
    acc = acc / total[:, None]
    at = out + batch * o_b + head * o_n + token[:, None] * o_s + e[None]
    tl.store(at, acc.to(out.dtype.element_ty), live[:, None] & inside[None])
    tl.store(logs + pair * half_tokens * HALVES + token, top + tl.math.log2(total), live)

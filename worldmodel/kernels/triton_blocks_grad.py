"""Block attention, backward: a kernel over tiles of keys for dk and dv, one over tiles of queries for dq, scores made anew in both.

The rule of `triton_blocks` read the other way round: a key token is seen by at most two runs of query tokens, one in each half.
No atomics: the same inputs give the same gradients.

Shapes: B batch, N heads, Q tokens of the sequence, E head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worldmodel.kernels.triton_blocks import (
    chunk_of,
    edge_block,
    free_block,
    half_tile,
    memory_block,
    memory_run,
    query_runs,
    run_blocks,
)
from worldmodel.kernels.triton_tiles import load_float, load_tile


@triton.jit
def key_runs(
    row,
    noisy,
    frames,
    HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    REACH: tl.constexpr,
    SINK: tl.constexpr,
    MEMORY: tl.constexpr,
    EVERY: tl.constexpr,
):
    """Query tokens that see key tokens `row` of one half: [low, high) in the first half, [far, far_end) in the noisy half."""
    frame = tl.minimum(row // TOKENS, frames - 1)
    start, end = chunk_of(frame, frames, CHUNK, FIRST)
    until = start * 0 + frames
    if REACH >= 0:  # the frame behind the last chunk that still reaches back to this frame
        horizon = frame + REACH + tl.where(frame % EVERY == 0, MEMORY * EVERY, 0)
        chunks = FIRST + tl.maximum(horizon - FIRST, 0) // CHUNK * CHUNK
        until = tl.where((frame < SINK) | (horizon >= frames), frames, tl.where(horizon < FIRST, 0, chunks))
    low, high = tl.where(noisy, 0, start), tl.where(noisy, 0, tl.maximum(until, start))
    far, far_end = start * 0, start * 0
    if HALVES == 2:
        far = frames + tl.where(noisy, start, end)
        far_end = frames + tl.where(noisy, end, tl.maximum(until, end))
    return low * TOKENS, high * TOKENS, far * TOKENS, far_end * TOKENS


@triton.jit(do_not_specialize=["queries"])
def block_delta_kernel(out, grad, delta, queries, heads, o_b, o_n, o_s, g_b, g_n, g_s, HEAD: tl.constexpr, WIDTH: tl.constexpr,
                       ROWS: tl.constexpr):  # fmt: skip
    """Program (tile, batch x head): delta (B,N,Q) = sum over E of out * grad, the softmax's share of its own gradient."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    row, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < queries)[:, None] & (e < HEAD)[None]
    a = load_float(out + batch * o_b + head * o_n + row[:, None] * o_s + e[None], inside)
    b = load_float(grad + batch * g_b + head * g_n + row[:, None] * g_s + e[None], inside)
    tl.store(delta + pair * queries + row, tl.sum(a * b, 1), row < queries)


@triton.jit
def key_step(q, g, k, v, dk, dv, log, delta, scale, visible, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of queries into dk (still to be scaled) and dv of a tile of keys; scores lie keys x queries."""
    weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - log[None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
    slope = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None])
    dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["frames"])
def block_keys_kernel(
    q,
    k,
    v,
    grad,
    logs,
    deltas,
    dk,
    dv,
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
    g_b,
    g_n,
    g_s,
    d_b,
    d_n,
    d_s,
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
    """Program (tile of keys of one half, batch x head); dk and dv have the same strides."""
    half_tokens = frames * TOKENS
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)  # early frames are seen by most: they start first
    batch, head = pair // heads, pair % heads
    noisy, row, token, live = half_tile(tile, half_tokens, ROWS)
    col, e = tl.arange(0, COLS), tl.arange(0, WIDTH)
    inside = e < HEAD
    mine = live[:, None] & inside[None]
    k_tile = tl.load(k + batch * k_b + head * k_n + token[:, None] * k_s + e[None], mine, other=0.0)
    v_tile = tl.load(v + batch * v_b + head * v_n + token[:, None] * v_s + e[None], mine, other=0.0)
    low, high, far, far_end = key_runs(row, noisy, frames, HALVES, TOKENS, CHUNK, FIRST, REACH, SINK, MEMORY, EVERY)
    begin, ahead, free, tail = run_blocks(low, high, COLS)
    far_begin, far_ahead, far_free, far_tail = run_blocks(far, far_end, COLS)
    q_base, g_base = q + batch * q_b + head * q_n, grad + batch * g_b + head * g_n
    q_offset, g_offset = col[:, None] * q_s + e[None], col[:, None] * g_s + e[None]
    line = pair * half_tokens * HALVES
    dk_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    dv_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(0, free + far_free):
        start = free_block(i, begin, ahead, free, far_begin, far_ahead, COLS)
        q_tile = load_tile(q_base, start, q_s, q_offset, inside, None, False)
        g_tile = load_tile(g_base, start, g_s, g_offset, inside, None, False)
        log, delta = tl.load(logs + line + start + col), tl.load(deltas + line + start + col)
        dk_tile, dv_tile = key_step(q_tile, g_tile, k_tile, v_tile, dk_tile, dv_tile, log, delta, scale, None, False, PRECISION)
    for i in range(0, ahead + tail + far_ahead + far_tail):
        start, since, until = edge_block(
            i, begin, ahead, free, tail, low, high, far_begin, far_ahead, far_free, far_tail, far, far_end, far, COLS
        )
        at = start + col
        valid = at < half_tokens * HALVES
        q_tile = load_tile(q_base, start, q_s, q_offset, inside, valid, True)
        g_tile = load_tile(g_base, start, g_s, g_offset, inside, valid, True)
        log, delta = tl.load(logs + line + at, valid, other=0.0), tl.load(deltas + line + at, valid, other=0.0)
        visible = (at[None] >= since[:, None]) & (at[None] < until[:, None])
        dk_tile, dv_tile = key_step(q_tile, g_tile, k_tile, v_tile, dk_tile, dv_tile, log, delta, scale, visible, True, PRECISION)
    at = batch * d_b + head * d_n + token[:, None] * d_s + e[None]
    tl.store(dk + at, (dk_tile * (scale / 1.4426950408889634)).to(dk.dtype.element_ty), mine)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mine)


@triton.jit
def query_step(q, g, k, v, dq, log, delta, scale, visible, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into dq (still to be scaled) of a tile of queries."""
    weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - log[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    slope = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["frames"])
def block_queries_kernel(
    q,
    k,
    v,
    grad,
    logs,
    deltas,
    dq,
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
    g_b,
    g_n,
    g_s,
    d_b,
    d_n,
    d_s,
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
    """Program (tile of queries of one half, batch x head): the forward pass's walk over keys."""
    half_tokens = frames * TOKENS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    noisy, row, token, live = half_tile(tile, half_tokens, ROWS)
    col, e = tl.arange(0, COLS), tl.arange(0, WIDTH)
    inside = e < HEAD
    mine = live[:, None] & inside[None]
    q_tile = tl.load(q + batch * q_b + head * q_n + token[:, None] * q_s + e[None], mine, other=0.0)
    g_tile = tl.load(grad + batch * g_b + head * g_n + token[:, None] * g_s + e[None], mine, other=0.0)
    line = pair * half_tokens * HALVES
    log, delta = tl.load(logs + line + token, live, other=0.0), tl.load(deltas + line + token, live, other=0.0)
    sink, low, high, own, own_end = query_runs(row, noisy, frames, TOKENS, CHUNK, FIRST, REACH, SINK)
    begin, ahead, free, tail = run_blocks(low, high, COLS)
    own_begin, own_ahead, own_free, own_tail = run_blocks(own, own_end, COLS)
    sinks = tl.cdiv(tl.max(sink, 0), COLS)
    k_base, v_base = k + batch * k_b + head * k_n, v + batch * v_b + head * v_n
    k_offset, v_offset = col[:, None] * k_s + e[None], col[:, None] * v_s + e[None]
    dq_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(0, free + own_free):
        start = free_block(i, begin, ahead, free, own_begin, own_ahead, COLS)
        k_tile = load_tile(k_base, start, k_s, k_offset, inside, None, False)
        v_tile = load_tile(v_base, start, v_s, v_offset, inside, None, False)
        dq_tile = query_step(q_tile, g_tile, k_tile, v_tile, dq_tile, log, delta, scale, None, False, PRECISION)
    for i in range(0, ahead + tail + own_ahead + own_tail + sinks):
        start, since, until = edge_block(
            i, begin, ahead, free, tail, low, high, own_begin, own_ahead, own_free, own_tail, own, own_end, sink, COLS
        )
        at = start + col
        k_tile = load_tile(k_base, start, k_s, k_offset, inside, at < half_tokens * HALVES, True)
        v_tile = load_tile(v_base, start, v_s, v_offset, inside, at < half_tokens * HALVES, True)
        visible = (at[None] >= since[:, None]) & (at[None] < until[:, None])
        dq_tile = query_step(q_tile, g_tile, k_tile, v_tile, dq_tile, log, delta, scale, visible, True, PRECISION)
    if MEMORY > 0:
        back, first, count = memory_run(sink, low, high, TOKENS, MEMORY, EVERY)
        for i in range(0, count * ((TOKENS + COLS - 1) // COLS)):
            start, visible = memory_block(i, first, back, low, col, TOKENS, EVERY, COLS)
            k_tile = load_tile(k_base, start, k_s, k_offset, inside, start + col < half_tokens * HALVES, True)
            v_tile = load_tile(v_base, start, v_s, v_offset, inside, start + col < half_tokens * HALVES, True)
            dq_tile = query_step(q_tile, g_tile, k_tile, v_tile, dq_tile, log, delta, scale, visible, True, PRECISION)
    at = dq + batch * d_b + head * d_n + token[:, None] * d_s + e[None]
    tl.store(at, (dq_tile * (scale / 1.4426950408889634)).to(dq.dtype.element_ty), mine)

"""Attention of one chunk's queries over the cache, split over keys: few queries over many keys would leave most of a GPU idle.

Every program walks a part of the keys with an online softmax; where there is more than one part, a second kernel weighs the parts
by their log-sum-exp (flash-decoding). The number of keys is a runtime value: a filling ring compiles nothing anew. From Hopper on
the tensor memory accelerator fetches the keys of wide heads: that takes neither registers nor instructions, and two small programs
a multiprocessor, each waiting for nobody, keep it busier than one large one.

Shapes: B batch, N heads, Q query and K key tokens, E head width, P parts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from worldmodel.kernels.triton_launch import LOG2E, capability, launch, multiprocessors, precision, strides
from worldmodel.kernels.triton_tiles import Tiles, load_float, load_tile, softmax_start, softmax_step

SETUP = 2  # what starting and ending a part costs, in key blocks that a program loads itself
DESCRIBED_SETUP = 12  # in those that it is sent
MAX_PARTS = 32


@lru_cache(maxsize=64)
def ring_tiles(queries: int, head: int, arch: int, described: bool) -> Tiles:
    """Tiles for `queries` tokens of width `head` on compute capability `arch` (90 for 9.0); described: keys come by descriptors,
    for which they were chosen by time on an H200, elsewhere by shared memory and registers."""
    most = 64 if described else 128
    rows = most if queries > 64 else 64 if queries > 32 else max(16, triton.next_power_of_2(queries))
    if head > 64 and arch != 80:
        return Tiles(rows, 64 if arch >= 90 else 32, 8 if rows > 64 else 4, 3 if arch >= 90 else 2)
    return Tiles(rows, 64, 8 if rows > 64 else 4, 3 if arch >= 90 else 2)


def can_describe(keys: Tensor, arch: int) -> bool:
    """Whether `keys` (B,N,K,E) can be fetched by the tensor memory accelerator, and are worth it: wide heads on Hopper and later.

    It wants 16-byte steps, and a width that is a whole tile's. Graph tracers do not know descriptors.
    """
    if torch.compiler.is_compiling() or arch < 90 or keys.element_size() != 2 or keys.shape[-1] not in (128, 256):
        return False
    return keys.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides(keys))


@lru_cache(maxsize=1024)
def plan_parts(tiles: int, blocks: int, slots: int, setup: int = SETUP) -> int:
    """Into how many parts to cut `blocks` key blocks when `tiles` query tiles run on `slots` programs at a time.

    Waves of programs times the length of one; a cut must save more than the extra setup costs.
    """
    costs = {}
    for parts in range(1, min(blocks, MAX_PARTS) + 1):
        waves = -(-tiles * parts // slots)
        costs[parts] = waves * (-(-blocks // parts) + setup) + (setup if parts > 1 else 0)
    return min(costs, key=lambda parts: (costs[parts], parts))


@triton.jit
def ring_tile(
    x, start, stride, offset, inside, valid, batch, head, MASKED: tl.constexpr, DESCRIBED: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows from `start` on of one head's keys or values: x is a descriptor of all of them, or points to that head's."""
    if DESCRIBED:
        tile = x.load([batch.to(tl.int32), head.to(tl.int32), start, 0]).reshape(COLS, WIDTH)
    else:
        tile = load_tile(x, start, stride, offset, inside, valid, MASKED)
    return tile


@triton.jit(do_not_specialize=["queries", "keys", "part_keys"])
def ring_kernel(
    q,
    k,
    v,
    out,
    logs,
    scale,
    queries,
    keys,
    part_keys,
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
    o_p,
    o_b,
    o_n,
    o_s,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PARTED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (query tile, batch x head, part). Writes the result, or with PARTED its part of it and the base-2 log-sum-exp.

    k and v are pointers, or with DESCRIBED descriptors (their strides are then not asked)."""
    tile, pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, head = pair // heads, pair % heads
    row, col, e = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, WIDTH)
    live = tile * ROWS + row < queries
    inside = e < HEAD
    q_tile = tl.load(
        q + batch * q_b + head * q_n + tile * ROWS * q_s + row[:, None] * q_s + e[None], live[:, None] & inside[None], other=0.0
    )
    first = part * part_keys
    last = tl.minimum(first + part_keys, keys)
    if not DESCRIBED:
        k += batch * k_b + head * k_n
        v += batch * v_b + head * v_n
    k_offset, v_offset = col[:, None] * k_s + e[None], col[:, None] * v_s + e[None]
    acc, top, total = softmax_start(ROWS, WIDTH)
    whole = (last - first) // COLS
    for i in range(0, whole):
        start = first + i * COLS
        k_tile = ring_tile(k, start, k_s, k_offset, inside, None, batch, head, False, DESCRIBED, COLS, WIDTH)
        v_tile = ring_tile(v, start, v_s, v_offset, inside, None, batch, head, False, DESCRIBED, COLS, WIDTH)
        acc, top, total = softmax_step(q_tile, k_tile, v_tile, acc, top, total, scale, None, False, False, PRECISION)
    start = first + whole * COLS
    if start < last:
        valid = start + col < last
        k_tile = ring_tile(k, start, k_s, k_offset, inside, valid, batch, head, True, DESCRIBED, COLS, WIDTH)
        v_tile = ring_tile(v, start, v_s, v_offset, inside, valid, batch, head, True, DESCRIBED, COLS, WIDTH)
        acc, top, total = softmax_step(q_tile, k_tile, v_tile, acc, top, total, scale, valid[None], True, False, PRECISION)
    acc = acc / total[:, None]
    at = out + part.to(tl.int64) * o_p + batch * o_b + head * o_n + tile * ROWS * o_s + row[:, None] * o_s + e[None]
    tl.store(at, acc.to(out.dtype.element_ty), live[:, None] & inside[None])
    if PARTED:
        pairs = tl.num_programs(1).to(tl.int64)
        tl.store(logs + (part.to(tl.int64) * pairs + pair) * queries + tile * ROWS + row, top + tl.math.log2(total), live)


@triton.jit(do_not_specialize=["queries", "parts"])
def ring_combine_kernel(
    partial, logs, out, queries, parts, heads, o_b, o_n, o_s, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Program (query tile, batch x head): the parts (P,B,N,Q,E), weighed by their base-2 log-sum-exps (P,B,N,Q)."""
    tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pairs = tl.num_programs(1).to(tl.int64)
    row, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    live = tile * ROWS + row < queries
    inside = live[:, None] & (e < HEAD)[None]
    acc, top, total = softmax_start(ROWS, WIDTH)
    line = pair * queries + tile * ROWS
    for _ in range(0, parts):
        log = tl.load(logs + line + row, live, other=0.0)
        values = load_float(partial + line * HEAD + row[:, None] * HEAD + e[None], inside)
        best = tl.maximum(top, log)
        keep, weight = tl.math.exp2(top - best), tl.math.exp2(log - best)
        acc = acc * keep[:, None] + values * weight[:, None]
        total = total * keep + weight
        top = best
        line += pairs * queries
    at = out + pair // heads * o_b + pair % heads * o_n + tile * ROWS * o_s + row[:, None] * o_s + e[None]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), inside)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, parts: int = 0) -> Tensor:
    """Softmax attention without a mask, scale 1/sqrt(E); no gradient.

    q (B,N,Q,E), k and v (B,N,K,E), K >= 1, rows contiguous, else of any strides (slices of a cache). parts: how often the keys are
    cut, 0 = by the size of the GPU. Returns (B,N,Q,E) in q's dtype, laid out (B,Q,N,E) so that merging heads copies nothing.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, queries, head), keys = q.shape, k.shape[2]
    arch = capability(q.device)
    described = can_describe(k, arch) and can_describe(v, arch)
    tiles = ring_tiles(queries, head, arch, described)
    tile_count, blocks = triton.cdiv(queries, tiles.rows), triton.cdiv(keys, tiles.cols)
    if not parts:
        slots = multiprocessors(q.device) * (1 if tiles.rows > 64 else 2)
        parts = plan_parts(tile_count * batch * heads, blocks, slots, DESCRIBED_SETUP if described else SETUP)
    part_keys = triton.cdiv(blocks, parts) * tiles.cols
    parts = triton.cdiv(keys, part_keys)  # no part may be empty
    out = torch.empty(batch, queries, heads, head, dtype=q.dtype, device=q.device).transpose(1, 2)
    partial, logs = out, out
    if parts > 1:  # rounded to q's type: their errors average out, and there are `parts` times as many as results
        partial = torch.empty(parts, batch, heads, queries, head, dtype=q.dtype, device=q.device)
        logs = torch.empty(parts, batch, heads, queries, dtype=torch.float32, device=q.device)
    grid = (tile_count, batch * heads, parts)
    target = partial if parts > 1 else out
    places = (
        *strides(q),
        *strides(k),
        *strides(v),
        target.stride(0) if parts > 1 else 0,
        *strides(target[0] if parts > 1 else target),
    )
    if described:
        k, v = (TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, tiles.cols, head]) for t in (k, v))
    constants = {"HEAD": head, "WIDTH": max(16, triton.next_power_of_2(head)), "ROWS": tiles.rows}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    launch(
        ring_kernel, grid, q, k, v, target, logs, LOG2E / head**0.5, queries, keys, part_keys, heads, *places,
        **constants, COLS=tiles.cols, PARTED=parts > 1, DESCRIBED=described, PRECISION=precision(q.dtype), **options,
    )  # fmt: skip
    if parts > 1:
        constants["ROWS"] = 16
        lines = (triton.cdiv(queries, 16), batch * heads)
        launch(ring_combine_kernel, lines, partial, logs, out, queries, parts, heads, *strides(out), **constants, num_warps=4)
    return out

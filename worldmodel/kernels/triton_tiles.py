"""What kernels share on the device: loads of tiles and rows, and the online softmax.

Shapes: M rows of a tile, C columns of a block, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiles:
    """Rows and columns a program holds at a time (queries and keys, but for dk and dv), its warps and its pipeline depth."""

    rows: int
    cols: int
    warps: int
    stages: int


@triton.jit
def load_float(at, inside):
    """Values in float32, zero where not `inside`."""
    return tl.load(at, inside, other=0.0).to(tl.float32)


@triton.jit
def load_tile(base, start, stride, offset, inside, valid, MASKED: tl.constexpr):
    """Rows start + offset of a (tokens, E) matrix; with MASKED those that are not `valid` are zero."""
    at = base + start.to(tl.int64) * stride + offset
    if MASKED:
        return tl.load(at, valid[:, None] & inside[None], other=0.0)
    return tl.load(at, inside[None], other=0.0)


@triton.jit
def softmax_start(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Before the first key: acc (M,E) unnormalised, top and total (M,) of base-2 scores."""
    return tl.zeros([ROWS, WIDTH], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def softmax_step(q, k, v, acc, top, total, scale, visible, MASKED: tl.constexpr, BLIND: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the online softmax. MASKED: only keys that are `visible`. BLIND: a row may see none in its first.

    scale > 0, so that the largest score scaled is the largest scaled score: scaling and subtracting are then one instruction.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    best = tl.maximum(top, tl.max(scores, 1) * scale)
    base = best
    if BLIND:
        base = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.math.exp2(scores * scale - base[:, None])
    keep = tl.math.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, best, total

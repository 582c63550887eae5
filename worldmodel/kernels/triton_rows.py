"""The element-wise steps of a block with a row of D values per program: norm with scale and shift, and the gated residual.

shift, scale and gate hold one row for all tokens of a frame: their gradients are sums over tokens. A program of the backward pass
walks a part of a frame's tokens and keeps these sums in registers; the parts' sums are added behind it. No atomics: the same inputs
give the same gradients.

Shapes: B batch, F frames, S tokens a frame, D model width, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worldmodel.kernels.triton_tiles import load_float


@triton.jit
def modulate_kernel(
    x,
    shift,
    scale,
    out,
    means,
    spreads,
    eps,
    frames,
    tokens,
    x_b,
    x_f,
    x_s,
    h_b,
    h_f,
    c_b,
    c_f,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Program (token, frame of a batch): layer norm without affine, then (1 + scale) and shift. KEPT: mean and 1/std are stored."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, frame = group // frames, group % frames
    d = tl.arange(0, WIDTH)
    inside = d < DIM
    row = load_float(x + batch * x_b + frame * x_f + token * x_s + d, inside)
    mean = tl.sum(row, 0) / DIM
    centred = tl.where(inside, row - mean, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    h = load_float(shift + batch * h_b + frame * h_f + d, inside)
    c = load_float(scale + batch * c_b + frame * c_f + d, inside)
    line = group * tokens + token
    tl.store(out + line * DIM + d, (centred * spread * (1.0 + c) + h).to(out.dtype.element_ty), inside)
    if KEPT:
        tl.store(means + line, mean)
        tl.store(spreads + line, spread)


@triton.jit
def modulate_grad_kernel(
    grad,
    x,
    scale,
    means,
    spreads,
    x_grad,
    sums,
    frames,
    tokens,
    part_tokens,
    x_b,
    x_f,
    x_s,
    c_b,
    c_f,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (part, frame of a batch). x_grad (B,F,S,D); sums (2,P,B*F,D) float32: of the shift, then of the scale."""
    part, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, frame = group // frames, group % frames
    d = tl.arange(0, WIDTH)
    inside = d < DIM
    gain = 1.0 + load_float(scale + batch * c_b + frame * c_f + d, inside)
    shift_sum = tl.zeros([WIDTH], tl.float32)
    scale_sum = tl.zeros([WIDTH], tl.float32)
    for token in range(part * part_tokens, tl.minimum((part + 1) * part_tokens, tokens)):
        line = group * tokens + token
        mean, spread = tl.load(means + line), tl.load(spreads + line)
        g = load_float(grad + line * DIM + d, inside)
        row = load_float(x + batch * x_b + frame * x_f + token * x_s + d, inside)
        normed = tl.where(inside, (row - mean) * spread, 0.0)
        slope = g * gain
        along, level = tl.sum(slope * normed, 0) / DIM, tl.sum(slope, 0) / DIM
        tl.store(x_grad + line * DIM + d, ((slope - level - normed * along) * spread).to(x_grad.dtype.element_ty), inside)
        shift_sum += g
        scale_sum += g * normed
    groups = tl.num_programs(1).to(tl.int64)
    at = sums + (part * groups + group) * DIM + d
    tl.store(at, shift_sum, inside)
    tl.store(at + tl.num_programs(0) * groups * DIM, scale_sum, inside)


@triton.jit
def gate_kernel(x, y, gate, out, frames, tokens, x_b, x_f, x_s, y_b, y_f, y_s, g_b, g_f, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Program (token, frame of a batch): x + y * gate."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, frame = group // frames, group % frames
    d = tl.arange(0, WIDTH)
    inside = d < DIM
    a = load_float(x + batch * x_b + frame * x_f + token * x_s + d, inside)
    b = load_float(y + batch * y_b + frame * y_f + token * y_s + d, inside)
    g = load_float(gate + batch * g_b + frame * g_f + d, inside)
    tl.store(out + (group * tokens + token) * DIM + d, (a + b * g).to(out.dtype.element_ty), inside)


@triton.jit
def gate_grad_kernel(
    grad,
    y,
    gate,
    y_grad,
    sums,
    frames,
    tokens,
    part_tokens,
    y_b,
    y_f,
    y_s,
    g_b,
    g_f,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (part, frame of a batch). y_grad (B,F,S,D); sums (P,B*F,D) float32 of the gate."""
    part, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, frame = group // frames, group % frames
    d = tl.arange(0, WIDTH)
    inside = d < DIM
    gain = load_float(gate + batch * g_b + frame * g_f + d, inside)
    gate_sum = tl.zeros([WIDTH], tl.float32)
    for token in range(part * part_tokens, tl.minimum((part + 1) * part_tokens, tokens)):
        line = group * tokens + token
        g = load_float(grad + line * DIM + d, inside)
        row = load_float(y + batch * y_b + frame * y_f + token * y_s + d, inside)
        tl.store(y_grad + line * DIM + d, (g * gain).to(y_grad.dtype.element_ty), inside)
        gate_sum += g * row
    tl.store(sums + (part * tl.num_programs(1).to(tl.int64) + group) * DIM + d, gate_sum, inside)

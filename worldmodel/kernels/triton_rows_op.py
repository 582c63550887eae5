"""`modulate` and `gate_residual` as differentiable operations over the kernels of `triton_rows`.

Shapes: B batch, F frames, S tokens a frame, D model width.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
from torch import Tensor

from worldmodel.kernels.triton_launch import launch, multiprocessors, strides
from worldmodel.kernels.triton_rows import gate_grad_kernel, gate_kernel, modulate_grad_kernel, modulate_kernel

PART_TOKENS = 8  # fewer tokens than this are not worth a program of their own


def _constants(dim: int) -> dict[str, int]:
    width = triton.next_power_of_2(dim)
    return {"DIM": dim, "WIDTH": width, "num_warps": min(8, max(1, width // 256))}


def _parts(groups: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """How many programs share the tokens of a frame, so that a GPU is filled four times over, and how many tokens each walks."""
    wanted = triton.cdiv(4 * multiprocessors(device), groups)
    each = triton.cdiv(tokens, max(1, min(wanted, tokens // PART_TOKENS)))
    return triton.cdiv(tokens, each), each


def _dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        (batch, frames, tokens, dim), kept = x.shape, any(ctx.needs_input_grad)
        out = torch.empty(x.shape, dtype=_dtype(x, shift, scale), device=x.device)
        stats = torch.empty(2, batch * frames * tokens if kept else 0, dtype=torch.float32, device=x.device)
        launch(
            modulate_kernel, (tokens, batch * frames), x, shift, scale, out, stats[0], stats[1], eps, frames, tokens,
            *strides(x), *strides(shift)[:2], *strides(scale)[:2], **_constants(dim), KEPT=kept,
        )  # fmt: skip
        ctx.save_for_backward(x, scale, stats)
        ctx.shift_dtype = shift.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, stats = ctx.saved_tensors
        grad, (batch, frames, tokens, dim) = grads[0].contiguous(), x.shape
        parts, each = _parts(batch * frames, tokens, x.device)
        x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty(2, parts, batch * frames, dim, dtype=torch.float32, device=x.device)
        launch(
            modulate_grad_kernel, (parts, batch * frames), grad, x, scale, stats[0], stats[1], x_grad, sums, frames, tokens, each,
            *strides(x), *strides(scale)[:2], **_constants(dim),
        )  # fmt: skip
        shift_grad, scale_grad = sums.sum(1).view(2, batch, frames, 1, dim)
        return x_grad, shift_grad.to(ctx.shift_dtype), scale_grad.to(scale.dtype), None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        batch, frames, tokens, dim = x.shape
        out = torch.empty(x.shape, dtype=_dtype(x, y, gate), device=x.device)
        launch(
            gate_kernel, (tokens, batch * frames), x, y, gate, out, frames, tokens,
            *strides(x), *strides(y), *strides(gate)[:2], **_constants(dim),
        )  # fmt: skip
        ctx.save_for_backward(y, gate)
        ctx.x_dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        grad, (batch, frames, tokens, dim) = grads[0].contiguous(), y.shape
        parts, each = _parts(batch * frames, tokens, y.device)
        y_grad = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        sums = torch.empty(parts, batch * frames, dim, dtype=torch.float32, device=y.device)
        launch(
            gate_grad_kernel, (parts, batch * frames), grad, y, gate, y_grad, sums, frames, tokens, each,
            *strides(y), *strides(gate)[:2], **_constants(dim),
        )  # fmt: skip
        return grad.to(ctx.x_dtype), y_grad, sums.sum(0).view(batch, frames, 1, dim).to(gate.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then (1 + scale) and shift, with gradients for x, shift and scale.

    x (B,F,S,D), shift and scale (B,F,1,D), all of any strides -> (B,F,S,D) contiguous, in the widest of their dtypes.
    """
    return _Modulate.apply(_rows(x), _rows(shift), _rows(scale), eps)  # type: ignore[no-any-return]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate with gradients for all three. x and y (B,F,S,D), gate (B,F,1,D) -> (B,F,S,D) in the widest of their dtypes."""
    return _GateResidual.apply(_rows(x), _rows(y), _rows(gate))  # type: ignore[no-any-return]

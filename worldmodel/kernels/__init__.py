"""The only door to the fused ops. Every op has its truth in `reference`; which implementation runs is decided here, by `KERNELS`.

``WORLDMODEL_KERNELS`` chooses: ``reference`` (plain PyTorch), ``auto`` (the kernels on an NVIDIA GPU with Triton, by the table) or
``triton`` (the kernels always, also for other types and in graphs; on a CPU that wants ``TRITON_INTERPRET=1``). Not set: `DEFAULT`.

Shapes: B batch, F frames, N heads, S tokens a frame, Q/K query and key tokens, E head width, D model width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.kernels import reference
from worldmodel.kernels.block_attention import BlockPlan, FrameRule, attend_by_plan, make_plan
from worldmodel.kernels.reference import attention, rotate

__all__ = [
    "KERNELS",
    "BlockPlan",
    "FrameRule",
    "attention",
    "available",
    "block_attention",
    "chosen",
    "conv_relu",
    "gate_residual",
    "linear_gelu",
    "modulate",
    "plan_blocks",
    "qk_norm_rope",
    "ring_attention",
    "rotate",
    "serves",
]

VARIABLE = "WORLDMODEL_KERNELS"
CHOICES = ("auto", "reference", "triton")
DEFAULT = "auto"
HALF = (torch.bfloat16, torch.float16)


def _ring() -> Callable[..., Any]:
    from worldmodel.kernels.triton_ring import ring_attention as kernel

    return kernel


def _blocks() -> Callable[..., Any]:
    from worldmodel.kernels.triton_blocks_op import block_attention as kernel

    return kernel


def _qk() -> Callable[..., Any]:
    from worldmodel.kernels.triton_qk import qk_norm_rope as kernel

    return kernel


def _modulate() -> Callable[..., Any]:
    from worldmodel.kernels.triton_rows_op import modulate as kernel

    return kernel


def _gate() -> Callable[..., Any]:
    from worldmodel.kernels.triton_rows_op import gate_residual as kernel

    return kernel


@dataclass(frozen=True)
class Kernel:
    """The Triton form of an op: how to import it, the types it is for (none: never), and whether also where a graph is compiled.

    Element-wise ops are left to the compiler there: it fuses them with their neighbours too.
    """

    load: Callable[[], Callable[..., Any]]  # import statements: tracers understand no other way
    dtypes: tuple[torch.dtype, ...]
    compiled: bool = False


KERNELS = {
    "ring_attention": Kernel(_ring, HALF),
    "block_attention": Kernel(_blocks, HALF, compiled=True),
    "qk_norm_rope": Kernel(_qk, (*HALF, torch.float32)),
    "modulate": Kernel(_modulate, (*HALF, torch.float32)),
    "gate_residual": Kernel(_gate, (*HALF, torch.float32)),
}

_able: dict[str, bool] = {}


def _can_run(device: torch.device) -> bool:
    """Whether kernels compile for this device: NVIDIA from Ampere on, and Triton installed.

    Asked once a device, and not by traced code, which cannot ask: the plan of a pass is made before.
    """
    key = f"{device.type}:{device.index}"
    if key not in _able and not torch.compiler.is_compiling():
        nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
        _able[key] = nvidia and importlib.util.find_spec("triton") is not None
    return _able.get(key, False)


def _wanted() -> str:
    """Raises ValueError on an unknown choice."""
    wanted = os.environ.get(VARIABLE, DEFAULT)
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} is {wanted!r}: it can be {', '.join(CHOICES)}")
    return wanted


@contextmanager
def chosen(choice: str) -> Iterator[None]:
    """`choice` in place of what the environment chooses."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _kernel(op: str, x: Tensor) -> Callable[..., Any] | None:
    """The Triton form of `op` for tensors like `x`, or None where the reference runs."""
    kernel, wanted = KERNELS[op], _wanted()
    if wanted == "reference" or x.is_meta:  # shapes alone are counted, not computed
        return None
    if wanted == "auto":
        if not x.is_cuda or x.dtype not in kernel.dtypes or not _can_run(x.device):
            return None
        if torch.compiler.is_compiling() and not kernel.compiled:
            return None
    return kernel.load()


def available(device: torch.device) -> bool:
    """Whether kernels run on `device`, for the types that they are for."""
    wanted = _wanted()
    return wanted == "triton" or (wanted == "auto" and _can_run(device))


def serves(op: str, dtype: torch.dtype) -> bool:
    """Whether a GPU that kernels compile for runs `op` on tensors of `dtype` by its kernel: what estimates go by."""
    wanted = _wanted()
    return wanted == "triton" or (wanted == "auto" and dtype in KERNELS[op].dtypes)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def ring_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a chunk over what the cache shows it. q (B,N,Q,E), k and v (B,N,K,E) -> (B,N,Q,E).

    The kernel has no backward pass: where a gradient is wanted the reference runs.
    """
    kernel = None if _wants_grad(q, k, v) else _kernel("ring_attention", q)
    return (kernel or reference.attention)(q, k, v)  # type: ignore[no-any-return]


def plan_blocks(frame_mask: np.ndarray, tokens: int, device: torch.device, rule: FrameRule | None = None) -> BlockPlan:
    """Prepare block attention on `device`: frame_mask (bool, query frames x key frames; every row sees something), and the same as
    a rule where it is one."""
    by_rule = rule is not None and available(device) and bool(KERNELS["block_attention"].dtypes)
    return make_plan(frame_mask, tokens, device, rule, flex=device.type == "cuda" and not by_rule)


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """Attention by `plan`. q (B,N,Q,E), k and v (B,N,K,E), frame-major tokens -> (B,N,Q,E)."""
    kernel = None if plan.rule is None or plan.dense else _kernel("block_attention", q)
    return attend_by_plan(q, k, v, plan) if kernel is None else kernel(q, k, v, plan.rule, plan.tokens)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    slot: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of q and k over D, gain, head split and rotation: q, k, v (B,S,D) -> (B,N,S,E) in v's dtype.

    gains (D,), cos and sin (S,E/2) float32. slot: places (B,N,S,E) in a cache that k and v are written to and returned as.
    The kernel has no backward pass: where a gradient is wanted the reference runs.
    """
    kernel = None if _wants_grad(q, k, v, gain_q, gain_k) else _kernel("qk_norm_rope", q)
    return (kernel or reference.qk_norm_rope)(q, k, v, gain_q, gain_k, eps, cos, sin, heads, slot)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then (1 + scale) and shift. x (B,F,S,D); shift and scale (B,F,1,D)."""
    return (_kernel("modulate", x) or reference.modulate)(x, shift, scale, eps)  # type: ignore[no-any-return]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate. x and y (B,F,S,D); gate (B,F,1,D)."""
    return (_kernel("gate_residual", x) or reference.gate_residual)(x, y, gate)  # type: ignore[no-any-return]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh form of GELU of a linear layer. x (...,I), weight (O,I), bias (O,) -> (...,O).

    On an NVIDIA GPU, where no gradient is wanted, one product of cuBLAS does all of it, and rounds once where two ops round twice.
    """
    if not _library_fuses(x, weight, bias):
        return reference.linear_gelu(x, weight, bias)
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None) -> Tensor:
    """ReLU of a convolution, to which `plus` was added. x (B,I,H,W), weight (O,I,k,k) with k odd, bias (O,), plus (B,O,H,W) ->
    (B,O,H,W).

    On an NVIDIA GPU, where no gradient is wanted, one call of cuDNN does all of it, and rounds once where two or three ops round
    each.
    """
    if not _library_fuses(x, weight, bias, plus):
        return reference.conv_relu(x, weight, bias, plus)
    ones, around = (1, 1), (weight.shape[2] // 2, weight.shape[3] // 2)
    if plus is None:
        return torch.cudnn_convolution_relu(x, weight, bias, ones, around, ones, 1)  # type: ignore[no-any-return]
    return torch.cudnn_convolution_add_relu(x, weight, plus, 1.0, bias, ones, around, ones, 1)  # type: ignore[no-any-return]


def _library_fuses(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a library of NVIDIA's does a product and what follows it in one call."""
    if _wanted() == "reference" or torch.compiler.is_compiling() or torch.version.hip is not None or not x.is_cuda:
        return False
    given = (x, weight, *(t for t in others if t is not None))
    return x.dtype in HALF and weight.dtype is x.dtype and not _wants_grad(*given)

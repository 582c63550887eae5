"""What `tests.benchmarks.kernels` times: every op at the shapes of real models, with what PyTorch offers for the same.

Shapes: B batch, N heads, S tokens a frame, E head width, F frames, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.benchmarks.timing import Work
from worldmodel import kernels
from worldmodel.kernels import reference
from worldmodel.kernels.block_attention import attend_by_groups, make_plan
from worldmodel.models.attention import Layout

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Job:
    """One op at one shape. flops, moved: work and bytes of one run. make: device -> contenders, ours under the key ``triton``.

    Contenders that return a tensor must agree. graphs: whether the op runs inside a CUDA graph when one plays.
    """

    op: str
    shape: str
    flops: float
    moved: float
    make: Callable[[torch.device], dict[str, Work]]
    graphs: bool = True


def _heads(device: torch.device, batch: int, tokens: int, count: int, head: int) -> Tensor:
    return torch.randn(batch, tokens, count * head, device=device, dtype=BF16).unflatten(-1, (count, head)).transpose(1, 2)


def _with_backend(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Work:
    from torch.nn.attention import sdpa_kernel

    def work() -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v)

    return work


def ring(shape: str, batch: int, count: int, head: int, tokens: int, window: int) -> Job:
    """One chunk of one frame against a full window."""
    keys = tokens * window

    def make(device: torch.device) -> dict[str, Work]:
        from torch.nn.attention import SDPBackend
        from torch.nn.attention.flex_attention import flex_attention

        from worldmodel.kernels.triton_ring import ring_attention

        store = torch.randn(2, batch, count, keys, head, device=device, dtype=BF16)
        q, (k, v) = _heads(device, batch, tokens, count, head), store
        flex = torch.compile(flex_attention, dynamic=False)
        return {
            "triton": lambda: ring_attention(q, k, v),
            "sdpa": lambda: functional.scaled_dot_product_attention(q, k, v),
            "sdpa flash": _with_backend(SDPBackend.FLASH_ATTENTION, q, k, v),
            "sdpa cudnn": _with_backend(SDPBackend.CUDNN_ATTENTION, q, k, v),
            "flex": lambda: flex(q, k, v),
        }

    pairs = batch * count * tokens * keys
    return Job("ring_attention", shape, 4.0 * pairs * head, 2.0 * batch * count * head * (2 * tokens + 2 * keys), make)


def _flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, tokens: int) -> Callable[[], Tensor]:
    """FlexAttention by a table of frames; its mask is made at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, length = torch.compile(flex_attention, dynamic=False), len(table) * tokens

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query // tokens, key // tokens]

    @cache
    def mask() -> Any:
        return torch.compile(create_block_mask)(visible, None, None, length, length, device=str(table.device))

    return lambda: attend(q, k, v, block_mask=mask())


def blocks(shape: str, batch: int, frames: int, count: int, head: int, tokens: int, window: int, train: bool) -> Job:
    """The teacher-forcing layout; train: with the backward pass, by the 3.5 times the products that it and the forward take."""
    layout = Layout.teacher_forcing(1, window)
    mask, length = layout.frame_mask(frames), 2 * frames * tokens

    def make(device: torch.device) -> dict[str, Work]:
        from worldmodel.kernels.triton_blocks_op import block_attention

        q, k, v = (_heads(device, batch, length, count, head).requires_grad_(train) for _ in range(3))
        grad = torch.randn_like(q)
        table, plan = torch.from_numpy(mask).to(device), make_plan(mask, tokens, device, None, flex=False)
        forms: dict[str, Callable[[], Tensor]] = {
            "triton": lambda: block_attention(q, k, v, layout.rule(frames), tokens),
            "flex": _flex(q, k, v, table, tokens),
            "sdpa by frames": lambda: attend_by_groups(q, k, v, plan),
        }
        if length < 10_000:  # the mask of all pairs
            forms["sdpa masked"] = lambda: reference.masked_attention(q, k, v, table, tokens)
        if not train:
            return dict(forms)
        return {name: lambda form=form: torch.autograd.grad(form(), (q, k, v), grad)[0] for name, form in forms.items()}

    pairs = batch * count * float(mask.sum()) * tokens**2
    flops, moved = 4.0 * pairs * head, 2.0 * batch * count * head * length * 4
    return Job("block_attention", f"{shape}{', with backward' if train else ''}", flops * (3.5 if train else 1), moved, make, False)


def qk(shape: str, count: int, head: int, tokens: int, window: int) -> Job:
    """Norm, rotation and the write into a cache, one frame."""
    dim = count * head

    def make(device: torch.device) -> dict[str, Work]:
        from worldmodel.kernels.triton_qk import qk_norm_rope

        q, k, v = torch.randn(1, tokens, 3 * dim, device=device, dtype=BF16).chunk(3, dim=-1)
        gain = torch.randn(dim, device=device, dtype=BF16)
        angles = torch.randn(tokens, head // 2, device=device)
        store = torch.zeros(2, 1, count, window * tokens, head, device=device, dtype=BF16)
        places = store[:, :, :, -tokens:]
        arguments = (q, k, v, gain, gain, 1e-6, angles.cos(), angles.sin(), count, (places[0], places[1]))
        composed = torch.compile(reference.qk_norm_rope, dynamic=False)
        forms = {"triton": qk_norm_rope, "eager": reference.qk_norm_rope, "compiled": composed}
        return {name: lambda form=form: form(*arguments)[0] for name, form in forms.items()}

    return Job("qk_norm_rope", shape, 0.0, 2.0 * 6 * tokens * dim + 4.0 * tokens * head, make)


def rows(op: str, shape: str, batch: int, frames: int, tokens: int, dim: int, train: bool) -> Job:
    """modulate or gate_residual over bf16 activations."""

    def make(device: torch.device) -> dict[str, Work]:
        from worldmodel.kernels import triton_rows_op

        x, y = (torch.randn(batch, frames, tokens, dim, device=device, dtype=BF16, requires_grad=train) for _ in range(2))
        table = torch.randn(batch, frames, 6, dim, device=device, dtype=BF16)
        a, b = (row.detach().requires_grad_(train) for row in table[:, :, :, None].unbind(2)[:2])
        inputs = (x, a, b) if op == "modulate" else (x, y, a)
        extra = (1e-6,) if op == "modulate" else ()
        truth, grad = getattr(reference, op), torch.randn_like(x)
        forms = {"triton": getattr(triton_rows_op, op), "eager": truth, "compiled": torch.compile(truth, dynamic=False)}
        if not train:
            return {name: lambda form=form: form(*inputs, *extra) for name, form in forms.items()}
        return {name: lambda form=form: torch.autograd.grad(form(*inputs, *extra), inputs, grad)[0] for name, form in forms.items()}

    size = 2.0 * batch * frames * tokens * dim
    passes = (2 if op == "modulate" else 3) + (3 if train else 0)  # backward: gradient and input in, gradient out
    return Job(op, f"{shape}{', with backward' if train else ''}", 0.0, passes * size, make, graphs=not train)


JOBS = [
    ring("rooms 40 x 480", 1, 5, 64, 40, 12),
    ring("wan 1560 x 9360", 1, 12, 128, 1560, 6),
    ring("wan 1560 x 18720", 1, 12, 128, 1560, 12),
    blocks("rooms B64 T24", 64, 24, 5, 64, 40, 12, False),
    blocks("rooms B64 T24", 64, 24, 5, 64, 40, 12, True),
    blocks("wan B1 T21", 1, 21, 12, 128, 1560, 0, False),
    blocks("wan B1 T21", 1, 21, 12, 128, 1560, 0, True),
    qk("rooms 40", 5, 64, 40, 12),
    qk("wan 1560", 12, 128, 1560, 12),
    *(rows(op, "wan 1 frame", 1, 1, 1560, 1536, False) for op in ("modulate", "gate_residual")),
    *(rows(op, "rooms B64 T24", 64, 48, 40, 320, True) for op in ("modulate", "gate_residual")),
    *(rows(op, "wan B1 T21", 1, 42, 1560, 1536, True) for op in ("modulate", "gate_residual")),
]
assert {job.op for job in JOBS} == set(kernels.KERNELS)

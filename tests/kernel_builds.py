"""Compiles every Triton kernel for GPUs that need not be there: `python -m tests.kernel_builds` prints one JSON line a build.

The launchers of worldmodel.kernels run on tensors without memory at the shapes of real models; what they would start is recorded
and compiled with the very constants, types and divisibilities. Registers and spills are those of the machine code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MULTIPROCESSORS = {80: 108, 89: 128, 90: 132}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block may take
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
Start = tuple[Any, tuple[Any, ...], dict[str, Any]]


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def heads(tokens: int, count: int, head: int, batch: int = 1) -> Tensor:
    """(B,N,S,E) as a linear layer's output of q, k and v leaves it."""
    return blank(batch, tokens, 3 * count * head)[..., : count * head].unflatten(-1, (count, head)).transpose(1, 2)


def ring(tokens: int, count: int, head: int, window: int) -> None:
    from worldmodel.kernels.triton_ring import ring_attention

    store = blank(2, 1, count, window * tokens, head)
    ring_attention(heads(tokens, count, head), store[0], store[1])


def blocks(frames: int, tokens: int, count: int, head: int, window: int, batch: int, memory: int = 0, every: int = 1) -> None:
    from worldmodel.kernels.block_attention import FrameRule
    from worldmodel.kernels.triton_blocks_op import block_backward, block_forward

    rule = FrameRule(frames, 1, window=window, doubled=True, memory=memory, every=every)
    q, k, v = (heads(2 * frames * tokens, count, head, batch) for _ in range(3))
    out, logs = block_forward(q, k, v, rule, tokens)
    block_backward(torch.empty_like(out), q, k, v, out, logs, rule, tokens)


def qk(tokens: int, count: int, head: int) -> None:
    from worldmodel.kernels.triton_qk import qk_norm_rope

    dim = count * head
    q, k, v = blank(1, tokens, 3 * dim).chunk(3, dim=-1)
    angles, gain = blank(tokens, head // 2, dtype=torch.float32), blank(dim)
    slot = blank(2, 1, count, 12 * tokens, head)[:, :, :, 2 * tokens : 3 * tokens]
    qk_norm_rope(q, k, v, gain, gain, 1e-6, angles, angles, count, (slot[0], slot[1]))


def rows(batch: int, frames: int, tokens: int, dim: int) -> None:
    from worldmodel.kernels.triton_rows_op import gate_residual, modulate

    x = blank(batch, frames, tokens, dim).requires_grad_()
    shift, scale, gate = blank(batch, frames, 3, dim, dtype=torch.float32)[:, :, :, None].requires_grad_().unbind(2)
    y = modulate(x, shift, scale, 1e-6)
    gate_residual(x, y, gate).backward(blank(batch, frames, tokens, dim, dtype=torch.float32))


CASES: dict[str, Callable[[], None]] = {
    "rooms play": lambda: ring(40, 5, 64, 12),
    "wan play": lambda: ring(1560, 12, 128, 12),
    "rooms train": lambda: blocks(24, 40, 5, 64, 12, 64),
    "rooms train, memory": lambda: blocks(96, 40, 5, 64, 12, 32, 12, 8),
    "wan train": lambda: blocks(21, 1560, 12, 128, 0, 1),
    "rooms qk": lambda: qk(40, 5, 64),
    "wan qk": lambda: qk(1560, 12, 128),
    "rooms rows": lambda: rows(64, 48, 40, 320),
    "wan rows": lambda: rows(1, 42, 1560, 1536),
}


def recorded(case: Callable[[], None], arch: int) -> list[Start]:
    """What `case` would start on a GPU of this capability."""
    from worldmodel.kernels import triton_blocks_op, triton_launch, triton_qk, triton_ring, triton_rows_op

    starts: list[Start] = []

    def record(kernel: Any, _grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        starts.append((kernel, arguments, options))

    with mock.patch.object(triton_launch, "_facts", lambda _device: (arch, MULTIPROCESSORS[arch])):
        patches = [mock.patch.object(m, "launch", record) for m in (triton_blocks_op, triton_qk, triton_ring, triton_rows_op)]
        for patch in patches:
            patch.start()
        try:
            case()
        finally:
            for patch in patches:
                patch.stop()
    return starts


def _source(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """As Triton's own launcher specialises: ones are constants, multiples of 16 are known to be, big strides are 64 bits wide."""
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    names = [parameter.name for parameter in kernel.params]
    for index, name in enumerate(names):
        value = arguments[index] if index < len(arguments) else options[name]
        if index >= len(arguments) or (isinstance(value, int) and value == 1 and name not in plain):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], facts[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                facts[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, facts)


def build(start: Start, arch: int) -> dict[str, Any]:
    """Compile one recorded start for sm_`arch`: registers a thread, bytes spilled, bytes of shared memory a block."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    kernel, arguments, options = start
    chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options} | {"enable_fp_fusion": True}
    done = triton.compile(_source(kernel, arguments, options), target=GPUTarget("cuda", arch, 32), options=chosen)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(done.asm["ptx"])
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", "--gpu-name", name, str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = ran.stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    ops = {op: op in done.asm["ptx"] for op in ("wgmma", "mma.sync", "cp.async", "cp.async.bulk.tensor")}
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "warps": done.metadata.num_warps,
        "stages": done.metadata.num_stages,
        "registers": registers,
        "spilled": spills,
        "shared": done.metadata.shared,
        "uses": [op for op, used in ops.items() if used],
    }


def builds(arch: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Build all cases whose name contains `only`."""
    for name, case in CASES.items():
        if only in name:
            for start in recorded(case, arch):
                yield {"case": name, **build(start, arch)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel_builds", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="part of a case's name")
    args = parser.parse_args()
    for arch in args.arch:
        for result in builds(arch, args.only):
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every Triton kernel against its reference in float64: odd shapes, new random inputs each run, poisoned memory, gradients too.

`python -m tests.kernel_cases` runs all of them, on the CPU in Triton's interpreter, and prints errors as JSON; on a GPU the tests
and the benchmark call `run`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from tests.kernel_checks import NAN, Errors, Setting, compare, error, poisoned


def split_heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def ring(batch: int, count: int, head: int, queries: int, keys: int, parts: int) -> Callable[[Setting], Errors]:
    def case(setting: Setting) -> Errors:
        from worldmodel.kernels import reference
        from worldmodel.kernels.triton_ring import ring_attention

        store = torch.full((2, batch, count, keys + 33, head), NAN, device=setting.device, dtype=setting.dtype)
        k, v = store[0, :, :, :keys].copy_(setting.draw(batch, count, keys, head)), store[1, :, :, :keys]
        v.copy_(setting.draw(batch, count, keys, head))
        q = split_heads(setting.draw(batch, queries, count * head, rows_apart=8), count)
        with poisoned():
            result = ring_attention(q, k, v, parts)
        return {"out": error(result, reference.attention(q.double(), k.double(), v.double()))}

    return case


def far_apart(setting: Setting) -> Errors:
    """Batch entries so far apart that offsets need 64 bits where strides do not. Memory between is never touched (16-bit only)."""
    from worldmodel.kernels import reference
    from worldmodel.kernels.triton_ring import ring_attention

    if setting.dtype is torch.float32:
        return {}
    gap = 2**30 + 64
    store = torch.empty(2 * gap + 2 * 640, dtype=setting.dtype, device=setting.device)
    k, v = (store[i * 640 :].as_strided((3, 2, 20, 16), (gap, 320, 16, 1)) for i in range(2))
    k.copy_(setting.draw(3, 2, 20, 16))
    v.copy_(setting.draw(3, 2, 20, 16))
    q = setting.draw(3, 2, 5, 16)
    return {"out": error(ring_attention(q, k, v), reference.attention(q.double(), k.double(), v.double()))}


def blocks(
    kind: str, frames: int, tokens: int, chunk: int, first: int, window: int, sink: int, head: int, memory: int = 0, every: int = 1
) -> Callable[[Setting], Errors]:
    def case(setting: Setting) -> Errors:
        from worldmodel.kernels import reference
        from worldmodel.kernels.triton_blocks_op import block_attention
        from worldmodel.models.attention import Layout

        layout, count = Layout(kind, chunk, window, first, sink, memory, every), 2
        mask = torch.from_numpy(layout.frame_mask(frames)).to(setting.device)
        inputs = [split_heads(setting.draw(2, len(mask) * tokens, count * head, rows_apart=8), count) for _ in range(3)]
        return compare(
            "out dq dk dv",
            lambda q, k, v: block_attention(q, k, v, layout.rule(frames), tokens),
            lambda q, k, v: reference.masked_attention(q, k, v, mask, tokens),
            inputs,
            setting,
        )

    return case


def qk(batch: int, tokens: int, count: int, head: int, cached: bool) -> Callable[[Setting], Errors]:
    def case(setting: Setting) -> Errors:
        from worldmodel.kernels import reference
        from worldmodel.kernels.triton_qk import qk_norm_rope

        dim = count * head
        q, k, v = setting.draw(batch, tokens, 3 * dim, rows_apart=8).chunk(3, dim=-1)
        gains = setting.draw(dim), setting.draw(dim, dtype=torch.float32)
        angles = setting.draw(tokens, head // 2, dtype=torch.float32)
        turn = angles.cos(), angles.sin()
        store = torch.full((2, batch, count, tokens + 9, head), NAN, device=setting.device, dtype=setting.dtype)
        slot = (store[0, :, :, 4 : 4 + tokens], store[1, :, :, 4 : 4 + tokens]) if cached else None
        with poisoned():
            ours = qk_norm_rope(q, k, v, *gains, 1e-6, *turn, count, slot)
        untouched = (store[:, :, :, :4].isnan().all() and store[:, :, :, 4 + tokens :].isnan().all()).item()
        doubled = [t.double() for t in (q, k, v, *gains)]
        with mock.patch.object(Tensor, "float", Tensor.double):  # the reference rotates in float32
            truth = reference.qk_norm_rope(*doubled, 1e-6, *(t.double() for t in turn), count)
        errors = {name: error(a, b) for name, a, b in zip("qkv", ours, truth, strict=True)}
        return errors | {"written outside": 0.0 if untouched else float("inf")}

    return case


def rows(op: str, batch: int, frames: int, tokens: int, dim: int) -> Callable[[Setting], Errors]:
    def case(setting: Setting) -> Errors:
        from worldmodel.kernels import reference, triton_rows_op

        x = setting.draw(batch, frames + 2, tokens, dim, rows_apart=3)[:, 2:]
        y = setting.draw(batch, frames * tokens, dim).unflatten(1, (frames, tokens))
        shift, scale, gate = setting.draw(batch, frames, 3, dim, dtype=torch.float32)[:, :, :, None].unbind(2)
        ours, truth = getattr(triton_rows_op, op), getattr(reference, op)
        if op == "gate_residual":
            return compare("out dx dy dgate", ours, truth, [x, y, gate], setting)
        return compare("out dx dshift dscale", lambda *a: ours(*a, 1e-6), lambda *a: truth(*a, 1e-6), [x, shift, scale], setting)

    return case


def model(cached: bool) -> Callable[[Setting], Errors]:
    """A whole network by its kernels against the same by plain PyTorch: in training with all gradients, or three frames of play."""

    def case(setting: Setting) -> Errors:
        from worldmodel.config import DiTConfig
        from worldmodel.models.attention import Layout
        from worldmodel.models.dit import DiT

        torch.manual_seed(setting.seed)
        net = DiT(DiTConfig(dim=48, layers=2, heads=2, ffn_dim=32, in_channels=3, out_channels=3, freq_dim=8, action_dim=2))
        torch.nn.init.normal_(net.head.weight)
        net = net.to(setting.device, setting.dtype)
        noisy, actions, sigma = setting.draw(1, 3, 3, 4, 6), setting.draw(1, 3, 2), setting.draw(1, 3).sigmoid()
        results = []
        for choice in ("reference", "triton"):
            with mock.patch.dict(os.environ, WORLDMODEL_KERNELS=choice), torch.set_grad_enabled(not cached):
                if cached:
                    cache, frames = net.make_cache((4, 6), 2), []
                    for i in range(3):
                        frames.append(net(noisy[:, i : i + 1], sigma[:, i : i + 1], actions[:, i : i + 1], cache=cache))
                        cache.commit()
                    results.append(frames)
                    continue
                out = net(noisy, sigma, actions, clean=noisy / 2, layout=Layout.teacher_forcing(1, 2))
                grads = torch.autograd.grad(out.float().square().sum(), list(net.parameters()), allow_unused=True)
                results.append([out, *(grad for grad in grads if grad is not None)])
        return {str(i): error(a, b) for i, (b, a) in enumerate(zip(*results, strict=True))}

    return case


def made_again(compiled: bool) -> Callable[[Setting], Errors]:
    """A network whose blocks are made again in backward against one that keeps all: the same gradients, no attention twice."""

    def case(setting: Setting) -> Errors:
        from train.distributed import Ranks, prepare_network
        from train.options import TrainOptions
        from worldmodel import kernels
        from worldmodel.config import DiTConfig
        from worldmodel.kernels import triton_blocks_op
        from worldmodel.models.attention import Layout
        from worldmodel.models.dit import DiT

        def blocks_alone(op: str, _: Tensor) -> Callable[..., Tensor] | None:
            """As in a compiled graph by default; the interpreter's kernels cannot be traced."""
            return kernels.KERNELS[op].load() if op == "block_attention" else None

        layers, results, runs = 3, [], []
        noisy, sigma = setting.draw(1, 3, 3, 4, 6), setting.draw(1, 3).sigmoid()
        for recompute in (False, True):
            torch.manual_seed(setting.seed)
            net = DiT(DiTConfig(dim=48, layers=layers, heads=2, ffn_dim=32, in_channels=3, out_channels=3, freq_dim=8))
            torch.nn.init.normal_(net.head.weight)
            net = net.to(setting.device, setting.dtype)
            prepare_network(net, Ranks(0, 1, setting.device), TrainOptions(checkpoint_activations=recompute), compiled=False)
            for block in net.blocks if compiled else ():
                block.compile(dynamic=False, backend="aot_eager")  # joint graph and partition as ever, without generated code
            counted = mock.Mock(wraps=triton_blocks_op.block_forward)
            with (
                mock.patch.dict(os.environ, WORLDMODEL_KERNELS="triton"),
                mock.patch.object(kernels, "_kernel", blocks_alone if compiled else kernels._kernel),
                mock.patch.object(triton_blocks_op, "block_forward", counted),
            ):
                out = net(noisy, sigma, clean=noisy / 2, layout=Layout.teacher_forcing(1, 2))
                grads = torch.autograd.grad(out.float().square().sum(), list(net.parameters()), allow_unused=True)
            results.append([out, *(grad for grad in grads if grad is not None)])
            runs.append(counted.call_count)
        errors = {str(i): error(a, b) for i, (b, a) in enumerate(zip(*results, strict=True))}
        return errors | {f"attention ran {runs} times": 0.0 if runs == [layers] * 2 else float("inf")}

    return case


CASES: dict[str, Callable[[Setting], Errors]] = {
    "ring_attention parted": ring(2, 2, 40, 37, 203, 3),
    "ring_attention one part": ring(1, 2, 64, 70, 129, 1),
    "ring_attention one key": ring(1, 1, 16, 1, 1, 0),
    "ring_attention own parts": ring(1, 2, 128, 5, 192, 0),
    "ring_attention far apart": far_apart,
    "block_attention frame by frame": blocks("teacher_forcing", 4, 7, 1, 0, 0, 0, 24),
    "block_attention window": blocks("teacher_forcing", 5, 40, 1, 0, 3, 0, 16),
    "block_attention chunks, sink": blocks("teacher_forcing", 6, 17, 2, 1, 4, 1, 16),
    "block_attention memory": blocks("teacher_forcing", 12, 7, 1, 0, 3, 0, 16, 2, 3),
    "block_attention memory, chunks, sink": blocks("teacher_forcing", 14, 5, 2, 0, 5, 1, 16, 2, 2),
    "block_attention memory, long frames": blocks("causal", 7, 70, 1, 0, 2, 0, 16, 2, 2),
    "block_attention causal": blocks("causal", 5, 50, 1, 0, 3, 1, 16),
    "block_attention long frames": blocks("teacher_forcing", 2, 150, 1, 0, 0, 0, 16),
    "qk_norm_rope": qk(2, 5, 3, 10, False),
    "qk_norm_rope into a cache": qk(2, 7, 2, 24, True),
    "modulate": rows("modulate", 2, 3, 19, 40),
    "modulate one token": rows("modulate", 1, 2, 1, 33),
    "gate_residual": rows("gate_residual", 2, 3, 19, 40),
    "model in training": model(cached=False),
    "model in play": model(cached=True),
    "model made again in backward": made_again(compiled=False),
    "model made again in backward, compiled": made_again(compiled=True),
}
BIG: dict[str, Callable[[Setting], Errors]] = {
    "ring_attention rooms": ring(1, 5, 64, 40, 480, 0),
    "ring_attention wan": ring(1, 12, 128, 1560, 9360, 0),
    "ring_attention wan, odd": ring(2, 3, 128, 1559, 4681, 5),
    "block_attention rooms": blocks("teacher_forcing", 24, 40, 1, 0, 12, 0, 64),
    "block_attention wide": blocks("teacher_forcing", 5, 390, 1, 0, 4, 1, 128),
    "block_attention chunks of three": blocks("causal", 9, 390, 3, 1, 7, 1, 128),
    "qk_norm_rope wan": qk(1, 1560, 12, 128, True),
    "modulate wan": rows("modulate", 1, 6, 1560, 1536),
    "gate_residual wan": rows("gate_residual", 1, 6, 1560, 1536),
}


def run(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Errors:
    """Errors of one case; everything it compares, by name."""
    return (CASES | BIG)[name](Setting(device, dtype, seed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel_cases", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs (default: a new one)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--only", default="", help="part of a case's name")
    args = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET") == "1", "on the CPU kernels run in the interpreter: set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    for name in CASES:
        if args.only in name:
            errors = run(name, torch.device("cpu"), getattr(torch, args.dtype), seed)
            print(json.dumps({"case": name, "seed": seed, "dtype": args.dtype, "errors": errors}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

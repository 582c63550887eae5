"""Which implementation of an op runs, and that every Triton kernel does what its reference does (cases: tests.kernel_cases)."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernel_cases import BIG, CASES, run
from tests.kernel_checks import TOLERANCE, allowed, error
from worldmodel import kernels
from worldmodel.kernels import reference
from worldmodel.models.attention import Layout

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", params=["float32", "float16"])
def interpreted(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], str]:
    """All cases by Triton's interpreter. In a process of its own: Triton chooses its interpreter once, when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernel_cases", "--dtype", request.param]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return request.param, {result["case"]: result for result in results}, done.stderr[-2000:]


@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name: str, interpreted: tuple[str, dict[str, Any], str]) -> None:
    dtype, results, problems = interpreted
    assert name in results, problems
    bad = {part: size for part, size in results[name]["errors"].items() if not size <= allowed(name, getattr(torch, dtype))}
    assert not bad, f"--only '{name}' --dtype {dtype} --seed {results[name]['seed']}: {bad}"


@pytest.mark.parametrize("name", CASES | BIG)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_kernels_on_the_gpu(name: str, dtype: torch.dtype, device: str) -> None:
    if name in BIG and dtype is torch.float32:
        pytest.skip("tiles are for 16-bit types")
    seed = int.from_bytes(os.urandom(4), "little")
    bad = {part: size for part, size in run(name, torch.device(device), dtype, seed).items() if not size <= allowed(name, dtype)}
    assert not bad, f"seed {seed}: {bad}"


def test_an_error_that_is_not_a_number_is_an_error() -> None:
    truth = torch.ones(2)
    assert error(torch.tensor([1.0, 1.5]), truth) == 0.5
    assert error(torch.tensor([1.0, float("nan")]), truth) == float("inf")
    assert error(torch.ones(3), truth) == float("inf")


def test_every_op_has_both_forms_with_one_signature() -> None:
    pytest.importorskip("triton")
    for op, kernel in kernels.KERNELS.items():
        door = list(inspect.signature(getattr(kernels, op)).parameters)
        triton_form = list(inspect.signature(kernel.load()).parameters)
        if op == "block_attention":  # the door takes the plan that holds the rule
            assert door == ["q", "k", "v", "plan"] and triton_form == ["q", "k", "v", "rule", "tokens"]
        else:
            assert triton_form[: len(door)] == door
            assert hasattr(reference, op) or op == "ring_attention"


def test_the_cpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLDMODEL_KERNELS", raising=False)
    assert all(kernels._kernel(op, torch.zeros(1)) is None for op in kernels.KERNELS)
    monkeypatch.setenv("WORLDMODEL_KERNELS", "reference")
    assert all(kernels._kernel(op, torch.zeros(1)) is None for op in kernels.KERNELS)


class OnGpu:
    """What the choice looks at, as a tensor on a GPU would show it."""

    is_cuda, is_meta, device = True, False, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_the_gpu_runs_triton_for_the_types_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("WORLDMODEL_KERNELS", raising=False)
    monkeypatch.setitem(kernels._able, "cuda:0", True)

    def chosen(dtype: torch.dtype) -> set[str]:
        return {op for op in kernels.KERNELS if kernels._kernel(op, OnGpu(dtype)) is not None}  # type: ignore[arg-type]

    with kernels.chosen("reference"):
        assert chosen(torch.bfloat16) == set()
    assert "WORLDMODEL_KERNELS" not in os.environ, "a choice for a while leaves nothing behind"
    assert chosen(torch.bfloat16) == chosen(torch.float16) == set(kernels.KERNELS)
    assert chosen(torch.float32) == {"qk_norm_rope", "modulate", "gate_residual"}
    assert chosen(torch.float64) == set()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(torch.bfloat16) == {"block_attention"}
    monkeypatch.setitem(kernels._able, "cuda:0", False)
    assert chosen(torch.bfloat16) == set()


def test_where_a_gradient_is_wanted_kernels_without_one_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kernel", lambda op, x: pytest.fail(f"{op} has no backward pass"))
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    assert kernels.ring_attention(q, q, q).requires_grad
    x, turn = torch.randn(1, 2, 4), torch.ones(2, 2)
    gain = torch.ones(4, requires_grad=True)
    assert kernels.qk_norm_rope(x, x, x, gain, gain, 1e-6, turn, turn, 1)[0].requires_grad


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDMODEL_KERNELS", "fast")
    with pytest.raises(ValueError, match="WORLDMODEL_KERNELS is 'fast': it can be auto, reference, triton"):
        kernels.modulate(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 1e-6)


def test_plans_with_and_without_a_rule_are_told_apart() -> None:
    layout = Layout.teacher_forcing(1, 2)
    with_rule = kernels.plan_blocks(layout.frame_mask(3), 2, CPU, layout.rule(3))
    assert with_rule.rule == layout.rule(3) and kernels.plan_blocks(layout.frame_mask(3), 2, CPU).rule is None
    assert kernels.plan_blocks(np.ones((2, 2), dtype=bool), 2, CPU).dense


def test_keys_are_cut_so_that_the_gpu_is_full() -> None:
    pytest.importorskip("triton")
    from worldmodel.kernels.triton_ring import plan_parts

    assert plan_parts(13 * 12, 147, 132) == 5  # 1560 queries, 12 heads: 55 % of a GPU in one part, 98 % in five
    assert plan_parts(5, 8, 264) > 1  # a small world: five tiles would leave the GPU empty
    assert plan_parts(10_000, 100, 132) == 1  # training batches fill it anyhow
    for tiles, blocks in ((1, 1), (1, 7), (156, 25), (999, 3)):
        assert 1 <= plan_parts(tiles, blocks, 132) <= blocks


class Ring(torch.nn.Module):
    def forward(self, q: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
        return kernels.ring_attention(q, store[0], store[1])


def test_forced_kernels_are_part_of_an_exported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("WORLDMODEL_KERNELS", "triton")
    q, store = torch.zeros(1, 2, 40, 64, dtype=torch.bfloat16), torch.zeros(2, 1, 2, 480, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(Ring(), (q, store), strict=False)
    assert [str(node.target) for node in program.graph.nodes].count("triton_kernel_wrapper_mutation") == 2


def test_block_attention_is_one_operator_of_a_traced_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("WORLDMODEL_KERNELS", "triton")
    layout, seen = Layout.teacher_forcing(1, 2), []
    plan = kernels.plan_blocks(layout.frame_mask(3), 2, CPU, layout.rule(3))

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *_: (torch.zeros(1, 2, 12, 8),)  # kernels need a GPU

    q = torch.zeros(1, 2, 12, 8, requires_grad=True)
    torch.compile(lambda x: kernels.block_attention(x, x, x, plan), backend=backend, fullgraph=True)(q)
    assert seen.count("worldmodel.block_attention.default") == 1


def test_training_traces_whole_graphs() -> None:
    from worldmodel.config import DiTConfig
    from worldmodel.models.dit import DiT

    net = DiT(DiTConfig(dim=16, layers=1, heads=2, ffn_dim=8, in_channels=2, out_channels=2, freq_dim=4))
    noisy, sigma = torch.randn(1, 2, 2, 2, 2), torch.rand(1, 2)
    ctx = net.context(noisy.shape, CPU, Layout.causal())
    traced = torch.compile(net.denoise, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(noisy, sigma, ctx), net.denoise(noisy, sigma, ctx))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_compiled_training_and_captured_play_on_the_gpu(device: str) -> None:
    from worldmodel.kernels.triton_ring import ring_attention

    layout = Layout.teacher_forcing(1, 3)
    plan = kernels.plan_blocks(layout.frame_mask(4), 40, torch.device(device, 0), layout.rule(4))
    q, k, v = (torch.randn(2, 2, 320, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda *qkv: kernels.block_attention(*qkv, plan), fullgraph=True)
    ours, truth = (
        torch.autograd.grad(form(q, k, v).float().square().sum(), (q, k, v))
        for form in (compiled, lambda *qkv: reference.masked_attention(*qkv, plan.table, 40))
    )
    assert max(error(a, b) for a, b in zip(ours, truth, strict=True)) <= TOLERANCE[torch.bfloat16]
    q, k, v = (t.detach() for t in (q, k, v))
    ring_attention(q, k, v)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ring_attention(q, k, v)
    q.normal_()
    graph.replay()
    assert error(out, reference.attention(q.double(), k.double(), v.double())) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_gelu_of_a_linear_layer(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((2, 3, 130, 96), (264, 96), (264,)))
    made = kernels.linear_gelu(x, weight / 10, bias)
    truth = torch.nn.functional.gelu(x.double() @ (weight / 10).double().T + bias.double(), approximate="tanh")
    assert made.dtype is dtype and error(made, truth) <= TOLERANCE[dtype]
    grad = kernels.linear_gelu(x, weight.requires_grad_(), bias).sum()
    grad.backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("added", [False, True])
def test_relu_of_a_convolution(device: str, dtype: torch.dtype, added: bool) -> None:
    torch.manual_seed(0)
    shapes = (2, 16, 9, 14), (24, 16, 3, 3), (24,), (2, 24, 9, 14)
    x, weight, bias, plus = (torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
    x, weight, more = x.to(memory_format=torch.channels_last), weight / 10, plus if added else None
    made = kernels.conv_relu(x, weight, bias, more)
    truth = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1) + (plus.double() if added else 0)
    assert made.dtype is dtype and error(made, truth.relu()) <= TOLERANCE[dtype]
    kernels.conv_relu(x, weight.requires_grad_(), bias, more).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0

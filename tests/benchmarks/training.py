"""`python -m tests.benchmarks.training`: a teacher-forcing step of a video network with random weights, against FlexAttention.

A step is the forward pass, the loss and the backward pass of one clip as the trainer makes them: fp32 weights, bf16 autocast,
blocks made again in backward. The optimiser is not counted. Contenders run one after the other in one process, each alone in
memory. The work is that of the layout (pairs of tokens that see each other), nothing that is made again counted; the peak is that
of matrix products in the same run. Who fails says why and stops nobody. Exit status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from train import distributed
from train.objectives import bell_weight, flow_matching
from train.options import TrainOptions
from train.stages.flow import attention_flops, dit_flops
from worldmodel import kernels, runtime
from worldmodel.config import DiTConfig
from worldmodel.diffusion import add_noise, velocity_target
from worldmodel.kernels.block_attention import _plan, make_plan
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT
from worldmodel.random_video import SIZES

LAYOUT = Layout.teacher_forcing()
PUBLISHED = "published layout"


@dataclass(frozen=True)
class Task:
    """What a step is: a clip of `frames` latents (C,H,W), on `device`, matrices multiplied in `dtype`."""

    config: DiTConfig
    latent: tuple[int, int, int]
    frames: int
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.latent[1] * self.latent[2] // self.config.patch**2

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, clean and noisy."""
        return 2 * self.frames * self.tokens

    def flops(self) -> float:
        """Of a step. Backward takes two products for each of forward, and in attention a fifth: the scores, which nobody keeps."""
        told = self.config, self.tokens, LAYOUT, self.frames
        crossed = 4.0 * self.length * self.config.text_len * self.config.dim * self.config.layers if self.config.text_dim else 0.0
        return 3 * dit_flops(*told) + (attention_flops(*told) + crossed) / 2


class Step:
    """A step of `task`; the same weights and data for everybody."""

    def __init__(self, task: Task, compiled: bool) -> None:
        torch.manual_seed(0)
        with task.device:
            self.model = DiT(task.config)
            nn.init.normal_(self.model.head.weight, std=0.02)  # it starts at zero, and lets no gradient pass
            self.clean, self.noise = torch.randn(2, 1, task.frames, *task.latent)
            self.sigma, self.mask = torch.rand(1, task.frames), torch.ones(1, task.frames, dtype=torch.bool)
            self.text = torch.randn(1, task.config.text_len, task.config.text_dim) if task.config.text_dim else None
        alone, options = distributed.Ranks(0, 1, task.device), TrainOptions(checkpoint_activations=True)
        distributed.prepare_network(self.model, alone, options, compiled)
        self.autocast = partial(torch.autocast, task.device.type, torch.bfloat16, enabled=task.dtype is torch.bfloat16)

    def loss(self) -> Tensor:
        noisy = add_noise(self.clean, self.noise, self.sigma)
        with self.autocast():
            velocity = self.model(noisy, self.sigma, text=self.text, clean=self.clean, layout=LAYOUT)
        return flow_matching(velocity, velocity_target(self.clean, self.noise), self.mask, bell_weight(self.sigma))

    def __call__(self) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return float(loss.detach())


@contextmanager
def all_made_again() -> Iterator[None]:
    """Blocks keep nothing but their input until backward."""
    with mock.patch.object(distributed, "keeps_attention", lambda *_: False):
        yield


@contextmanager
def published() -> Iterator[None]:
    """As published trainers have it: FlexAttention, compiled, with a mask of blocks from the table of frames; the rest eager."""
    attend = torch.compile(flex_attention, dynamic=False)
    with (
        kernels.chosen("reference"),
        mock.patch.object(kernels, "plan_blocks", partial(make_plan, flex=True)),
        mock.patch.object(kernels, "block_attention", lambda q, k, v, plan: attend(q, k, v, block_mask=plan.flex)),
    ):
        yield


@dataclass(frozen=True)
class Contender:
    """around: what is in force while it is made and runs. compiled: its blocks, as the trainer does by default on a GPU."""

    around: Callable[[], AbstractContextManager[None]] = nullcontext
    compiled: bool = False


CONTENDERS = {
    "ours": Contender(),
    "ours, attention made again": Contender(all_made_again),
    PUBLISHED: Contender(published),
    "ours, compiled": Contender(compiled=True),
}


class Memory:
    """Bytes of tensors on a device since it was made; nothing where the device does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self.now()

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device else 0

    def peak(self) -> int:
        """The most there was at once, what was there before included."""
        return torch.cuda.max_memory_allocated(self.device) if self.device else 0


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on the device too."""
    runtime.synchronize(device)

    def whole() -> None:
        work()
        runtime.synchronize(device)

    return runtime.timed(whole)


def plan_cost(task: Task) -> dict[str, float]:
    """Of preparing who sees whom, once a layout: seconds, bytes while it is made, and bytes that stay."""

    def prepare(frames: int) -> object:
        return kernels.plan_blocks(LAYOUT.frame_mask(frames), task.tokens, task.device, LAYOUT.rule(frames))

    _plan.cache_clear()
    prepare(1)  # what any first call does
    memory = Memory(task.device)
    seconds = timed(lambda: prepare(task.frames), task.device)
    return {"seconds": seconds, "peak_bytes": memory.peak() - memory.before, "kept_bytes": memory.now() - memory.before}


def measure(task: Task, contender: Contender, steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps behind one that warms up and compiles, bytes at the worst moment of them, the loss of each."""
    with contender.around():
        plan, step, losses = plan_cost(task), Step(task, contender.compiled), list[float]()

        def run() -> None:
            losses.append(step())

        first = timed(run, task.device)
        memory = Memory(task.device)
        seconds = [timed(run, task.device) for _ in range(steps)]
        return {"plan": plan, "first_step": first, "steps": seconds, "peak_bytes": memory.peak(), "losses": losses}


def row_of(name: str, found: dict[str, Any], task: Task, peak: float) -> dict[str, Any]:
    """One row of the report. peak: FLOP/s of matrix products."""
    seconds = statistics.median(found["steps"])
    speed = {"seconds": seconds, "tokens_per_s": task.length / seconds, "tflops": task.flops() / seconds / 1e12}
    return {"name": name, **speed, "share_of_peak": task.flops() / seconds / peak, **found}


def bench(
    task: Task, steps: int, contenders: dict[str, Contender], peak: float, tell: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Rows of all contenders; `tell` gets each as soon as it is there."""
    rows = []
    for name, contender in contenders.items():
        try:
            row = row_of(name, measure(task, contender, steps), task, peak)
        except Exception as problem:  # out of memory, a compiler's refusal: it is the finding
            row = {"name": name, "failed": f"{type(problem).__name__}: {str(problem).strip()[:300]}"}
        rows.append(row)
        tell(row)
        torch.compiler.reset()
        gc.collect()  # networks and their blocks hold each other
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with how many times faster than the published layout they are, where that ran."""
    base = next((row["seconds"] for row in rows if row["name"] == PUBLISHED and "seconds" in row), None)
    return [row | {"times_published": base / row["seconds"]} if base and "seconds" in row else row for row in rows]


HEAD = f"{'':28} {'s a step':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'of peak':>8} {'peak GB':>8} {'plan ms':>8} {'plan MB':>8}  times"


def describe(row: dict[str, Any]) -> str:
    """One line below `HEAD`."""
    if "failed" in row:
        return f"{row['name']:28} failed: {row['failed']}"
    plan, times = row["plan"], f"{row['times_published']:6.2f}" if "times_published" in row else f"{'':>6}"
    line = f"{row['name']:28} {row['seconds']:9.3f} {row['tokens_per_s']:9.0f} {row['tflops']:8.1f} {row['share_of_peak']:8.1%}"
    return f"{line} {row['peak_bytes'] / 1e9:8.2f} {plan['seconds'] * 1e3:8.2f} {plan['peak_bytes'] / 1e6:8.1f} {times}"


def report(task: Task, steps: int, contenders: dict[str, Contender], out: Path) -> None:
    """Measure, print rows as they come and all of them compared at the end; `out` holds at any time what there is."""
    peak = runtime.matmul_peak(task.device, task.dtype)
    kind, work = str(task.dtype).removeprefix("torch."), task.flops() / 1e12
    facts: dict[str, Any] = {**runtime.describe_machine(), "layers": task.config.layers, "frames": task.frames}
    facts |= {"tokens": task.length, "tflop": work, "peak_tflops": peak / 1e12}
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}: matrix products {peak / 1e12:.4g} TFLOP/s in {kind}")
    print(f"a step: {task.config.layers} layers, {task.length} tokens, {work:.4g} TFLOP forward and backward")
    print(HEAD, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    so_far: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        so_far.append(row)
        out.write_text(json.dumps({"facts": facts, "results": compared(so_far)}, indent=1) + "\n", encoding="utf-8")
        print(describe(row), flush=True)

    rows = bench(task, steps, contenders, peak, tell)
    print("", f"times: faster than the {PUBLISHED}", HEAD, *map(describe, compared(rows)), sep="\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    made.add_argument("--size", default="1.3b", choices=sorted(SIZES), help="of the network (default: 1.3b)")
    made.add_argument("--layers", type=int, help="fewer than the size has, for a quick look")
    made.add_argument("--frames", type=int, default=21, help="latents of the clip (default: 21)")
    made.add_argument("--steps", type=int, default=3, help="timed steps of each (default: 3)")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/training.json"), help="where the numbers go")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: training steps are timed on a GPU only", file=sys.stderr)
        return 2
    runtime.setup()
    world, device = SIZES[args.size], torch.device("cuda", torch.cuda.current_device())
    config = replace(world.model, layers=args.layers or world.model.layers)
    task = Task(config, world.latent_size, args.frames, device, torch.bfloat16)
    report(task, args.steps, CONTENDERS, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

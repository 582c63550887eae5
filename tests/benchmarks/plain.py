"""`python -m tests.benchmarks.plain`: our engine against the same network in plain PyTorch (`plain_network`), on the GPU at hand.

An action is all passes of a frame and the one that commits it: the network alone, nothing is decoded. The contenders have the same
weights and dream of the same noise; they take turns in one process, by the clock of the host, which waits for the GPU after every
action. The share of the peak is that of the products that an action cannot do without, over the matrix products of this run.
Compiled is every block by itself, once the cache is full, its indices on the host, so that nothing of it waits for the GPU.

Exit status 1 if a contender failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.plain_network import POSITIONS, PlainDiT, PlainRollout
from worldmodel import runtime
from worldmodel.config import WorldConfig
from worldmodel.diffusion import noise_levels
from worldmodel.frame_program import FrameProgram, Given
from worldmodel.game.stats import percentiles, write_json
from worldmodel.measure import Progress
from worldmodel.models.dit import DiT
from worldmodel.random_video import SIZES, random_video

OURS, EAGER, COMPILED = "ours, graphs", "plain eager", "plain torch.compile, cuDNN attention"
TURNS = 5
SETTLE = 4  # frames with a full cache before the clock counts: what is compiled, met and captured is, by then

Drawn = tuple[Tensor, list[Tensor]]
"""The noise of a frame (1,1,C,H,W), and fresh noise for every level behind the first."""

Act = Callable[[Tensor, list[Tensor]], Tensor]
"""A frame from what was drawn for it: its clean latent (1,1,C,H,W), which is committed, too."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks.plain", description=__doc__)
    made.add_argument("--actions", type=int, default=30, help="timed of every contender")
    made.add_argument("--size", default="1.3b", choices=list(SIZES), help="of the network")
    made.add_argument("--window", type=int, default=12, help="latent frames that attention sees")
    made.add_argument(
        "--mode", default="default", help="of torch.compile; public demos take max-autotune-no-cudagraphs, for minutes"
    )
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/plain.json"), help="where the numbers go")
    return made


def contenders(model: DiT, config: WorldConfig, text: Tensor, capture: bool, mode: str) -> dict[str, Callable[[], Act]]:
    """What makes each of them ready. text: the encoder's output (1,<=L,text_dim). capture: ours as CUDA graphs."""
    sampler, (_, *latent_hw) = config.sampler, config.latent_size
    levels, size, device = noise_levels(sampler.steps, sampler.shift, sampler.sigmas), (latent_hw[0], latent_hw[1]), text.device

    def ours() -> Act:
        program = FrameProgram(model, model.make_cache(size, sampler.window), sampler)
        program.capture, given = capture, Given(text=model.text_states(text))

        def act(noise: Tensor, draws: list[Tensor]) -> Tensor:
            clean = program.denoise(noise, levels, lambda i: draws[i], given)
            program.commit(clean, given, sampler.context_sigma)
            program.look_ahead(config.latent_size)
            return clean

        return act

    def eager() -> Act:
        return PlainRollout(PlainDiT(model), sampler, levels, text, size, indices=device).act

    def compiled() -> Act:
        steady = PlainDiT(model)
        for block in steady.blocks:  # they share their code, so the first is compiled for all
            block.compile(dynamic=False, fullgraph=True, mode=mode)
        rollout = PlainRollout(PlainDiT(model), sampler, levels, text, size, torch.device("cpu"), steady)

        def act(noise: Tensor, draws: list[Tensor]) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return rollout.act(noise, draws)

        return act

    return {OURS: ours, EAGER: eager, COMPILED: compiled}


def draw(config: WorldConfig, count: int, like: Tensor) -> list[Drawn]:
    """For `count` frames, on the device and in the type of `like`."""
    noise = torch.randn(count, config.sampler.steps, 1, 1, *config.latent_size, generator=runtime.generator(0, "plain"))
    return [(first, list(others)) for first, *others in noise.to(like)]


def flops(model: DiT, config: WorldConfig) -> float:
    """Of an action with a full cache: the least that linears and attention take, keys and values of the text being known."""
    cfg, sampler = model.cfg, config.sampler
    tokens = config.latent_size[1] * config.latent_size[2] // cfg.patch**2
    parts = (*model.blocks, model.patch, model.head)
    layers = ((name, layer) for part in parts for name, layer in part.named_modules() if isinstance(layer, nn.Linear))
    weights = sum(layer.weight.numel() for name, layer in layers if name != "cross.kv")
    pairs = 2 * cfg.layers * cfg.dim * (sampler.window * tokens + cfg.text_len)
    return 2.0 * (sampler.steps + 1) * tokens * (weights + pairs)


@torch.no_grad()
def contest(
    makers: Mapping[str, Callable[[], Act]], drawn: Sequence[Drawn], warm: int, actions: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Rows by contender: seconds of every action, and the latent of the last frame before them; or why it ``failed``.

    warm: frames before the clock counts. Every contender goes on with its video at its next turn; the first action of a turn is not
    counted.
    """
    rows, works = dict[str, dict[str, Any]](), dict[str, Callable[[], Tensor]]()

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as problem:  # whatever compilers, backends and full memories raise: the others go on
            works.pop(name, None)
            rows[name] = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:300]}
            progress.say(f"{name}: {rows[name]['failed']}")

    def prepare(name: str) -> None:
        progress.say(f"{name}: {warm} frames to warm up")
        act, feed = makers[name](), cycle(drawn)
        works[name] = lambda: act(*next(feed))
        for _ in range(warm):
            latent = works[name]()
        rows[name] = {"latent": latent.clone(), "seconds": []}
        runtime.synchronize(latent.device)

    def turn(name: str, count: int) -> None:
        device = drawn[0][0].device
        for i in range(count + 1):
            runtime.synchronize(device)
            begun = time.perf_counter()
            works[name]()
            runtime.synchronize(device)
            if i:
                rows[name]["seconds"].append(time.perf_counter() - begun)

    for name in makers:
        attempt(name, partial(prepare, name))
    progress.say(f"timing {actions} actions each, in turns")
    turns = min(TURNS, actions)
    for number in range(turns):
        for name in list(works):
            attempt(name, partial(turn, name, actions // turns + (number < actions % turns)))
    return rows


def results(rows: Mapping[str, dict[str, Any]], work: float, peak: float) -> dict[str, dict[str, Any]]:
    """What `contest` found, for people. times_ours: by medians. difference: of latents, root mean square relative to ours."""
    found = dict[str, dict[str, Any]]()
    ours = rows.get(OURS, {})
    for name, row in rows.items():
        if "failed" in row:
            found[name] = row
            continue
        middle = statistics.median(row["seconds"])
        found[name] = {f"{key}_ms": value for key, value in percentiles([s * 1e3 for s in row["seconds"]], (50, 95)).items()}
        found[name]["roof_share"] = work / middle / peak
        if "seconds" in ours:
            latent, truth = row["latent"].double(), ours["latent"].double()
            found[name]["times_ours"] = middle / statistics.median(ours["seconds"])
            found[name]["difference"] = ((latent - truth).square().mean() / truth.square().mean()).sqrt().item()
    return found


def report(card: Mapping[str, Any]) -> str:
    """The card for people: what was measured, then a line a contender."""
    lines = [f"{name:<20} {value}" for name, value in card.items() if name != "contenders"]
    lines.append(f"{'':<38}{'p50 ms':>9}{'p95 ms':>9}{'of peak':>9}{'x ours':>8}{'latents differ by':>19}")
    for name, row in card["contenders"].items():
        if "failed" in row:
            lines.append(f"{name:<38}  failed: {row['failed']}")
            continue
        beside = f"{row['times_ours']:>8.2f}{row['difference']:>19.2g}" if "times_ours" in row else ""
        lines.append(f"{name:<38}{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}{row['roof_share']:>9.1%}{beside}")
    return "\n".join(lines)


def measure(device: torch.device, size: str, window: int, actions: int, mode: str, progress: Progress) -> dict[str, Any]:
    """The result card. The rows of the contenders, `results`, are under ``contenders``."""
    session = random_video(size, device, runtime.pick_dtype(device), window=window, say=progress.say)
    model, config, warm = session.model, session.config, window - 1 + SETTLE
    weight = model.head.weight
    nn.init.normal_(weight, std=0.02)  # it begins at zero, where all contenders agree whatever they do
    text = torch.randn(1, 64, model.cfg.text_dim, generator=runtime.generator(0, "text")).to(weight)
    peak, work = runtime.matmul_peak(device, weight.dtype), flops(model, config)
    makers = contenders(model, config, text, capture=device.type == "cuda", mode=mode)
    rows = contest(makers, draw(config, warm, weight), warm, actions, progress)
    return {
        **runtime.describe_machine(),
        "size": size,
        "picture": f"{config.width}x{config.height}",
        "window": window,
        "steps": config.sampler.steps,
        "actions_timed": actions,
        "compile_mode": mode,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "tflop_per_action": work / 1e12,
        "matmul_peak_tflops": peak / 1e12,
        "contenders": results(rows, work, peak),
    }


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    most = POSITIONS - (args.window - 1 + SETTLE) - TURNS
    if args.window < 2 or not 1 <= args.actions <= most:
        parser().error(f"--window is at least 2, --actions lies in 1 to {most}")
    if not torch.cuda.is_available():
        print("no CUDA device: the network is timed on a GPU only", file=sys.stderr)
        return 2
    runtime.setup()
    runtime.host_threads("auto")
    device = torch.device("cuda", torch.cuda.current_device())
    card = measure(device, args.size, args.window, args.actions, args.mode, Progress(sys.stderr))
    write_json(args.out, card)
    print(report(card))
    return int(any("failed" in row for row in card["contenders"].values()))


if __name__ == "__main__":
    sys.exit(main())

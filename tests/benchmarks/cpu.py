"""python -m tests.benchmarks.cpu: the engines of *rooms* on this CPU, frame by frame in turns with the plain engine in float32.

Before every turn the machine is asked what its products and PyTorch's attention reach then: on a host with other guests that
changes by the second. All passes of a frame, its decoding and its commit are counted. Two roofs: that of products, as if attention
could run as fast as they do, and one where attention runs as fast as PyTorch's does. Both are for the work of the plain engine,
whose commit goes through the whole network; a compiled one ends with the last keys and values. With ``--busy`` then the compiled
engine, undisturbed and beside a process that keeps a core busy, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import worldmodel
from worldmodel import runtime
from worldmodel.action import Action
from worldmodel.game.stats import percentiles, write_json
from worldmodel.measure import work_of_action
from worldmodel.session import WorldSession

CPU = torch.device("cpu")
HELD = Action(frozenset({"forward"}))
ROOT = Path(__file__).parents[2]
BUSY_FRAMES, SETTLE_S = 60, 0.3
TRIES = 3  # of what a roof is made of


def engines(world: str, threads: int) -> dict[str, WorldSession]:
    """Sessions by name, each with a full memory; the last two are the compiled engine in the best type, apart and merged."""
    dtypes = dict.fromkeys((torch.float32, runtime.pick_dtype(CPU)))
    made = {}
    for dtype, compile_, merge in ((torch.float32, "off", False), *product(dtypes, ("on",), (False, True))):
        session = worldmodel.load(world, device="cpu", threads=threads, dtype=dtype, compile=compile_, merge=merge)
        for _ in range(session.cache.until_full):
            frame(session)
        made[f"{session.engine}, {session.dtype}{', merged commit' if merge else ''}"] = session
    return made


def frame(session: WorldSession) -> None:
    session.step(HELD)
    session.finish()


def attention_peak(dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's attention at a size that suits it, 256 queries, 4096 keys, five heads of 64: the best of some tries."""
    q, kv = (torch.randn(1, 5, length, 64).to(dtype) for length in (256, 4096))
    best = min(runtime.timed(lambda: functional.scaled_dot_product_attention(q, kv, kv)) for _ in range(TRIES))
    return 4 * q.numel() * kv.shape[2] / best


def summary(seconds: list[float], plain: list[float], roof: list[float], roof_with_attention: list[float]) -> dict[str, Any]:
    """Of one engine's turns; plain: seconds of the plain engine in the same turns; roofs: seconds of a frame at them."""
    return {
        "frames_per_second": len(seconds) / sum(seconds),
        **{f"{name}_ms": value for name, value in percentiles([s * 1e3 for s in seconds], (50, 95)).items()},
        "times_float32_eager": sum(plain) / sum(seconds),
        "times_float32_eager_p50": statistics.median(p / t for p, t in zip(plain, seconds, strict=True)),
        "share_of_products_roof_p50": statistics.median(r / t for r, t in zip(roof, seconds, strict=True)),
        "share_of_roof_with_attention_p50": statistics.median(r / t for r, t in zip(roof_with_attention, seconds, strict=True)),
    }


def beside_a_busy_process(session: WorldSession, rounds: int) -> dict[str, Any]:
    """Frames undisturbed, and beside a loop without end, `BUSY_FRAMES` of each in every round."""
    times: dict[str, list[float]] = {"idle": [], "busy": []}
    for _ in range(rounds):
        for name, found in times.items():
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if name == "busy" else None
            try:
                time.sleep(SETTLE_S)  # it starts, or what it left is over
                found.extend(runtime.timed(lambda: frame(session)) for _ in range(BUSY_FRAMES))
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    rows = {name: percentiles([s * 1e3 for s in found], (50, 95, 99)) for name, found in times.items()}
    return {"rounds": rounds, "frames_ms": rows, "busy_over_idle_p95": rows["busy"]["p95"] / rows["idle"]["p95"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cpu", description=__doc__)
    parser.add_argument("--world", default=str(ROOT / "assets/worlds/rooms"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--busy", type=int, default=0, metavar="ROUNDS", help="of frames beside a busy process, and without it")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cpu.json"))
    args = parser.parse_args(argv)
    sessions = engines(args.world, args.threads)
    work = work_of_action(sessions["eager, float32"])
    attention = work.pop("aten.bmm")
    products = sum(work.values())
    reached: dict[torch.dtype, list[tuple[float, float]]] = {session._dtype: [] for session in sessions.values()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    roofs: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for _ in range(args.turns):
        for name, session in sessions.items():
            peak, attending = runtime.matmul_peak(CPU, session._dtype, tries=TRIES), attention_peak(session._dtype)
            times[name].append(runtime.timed(lambda s=session: frame(s)))  # type: ignore[misc]
            reached[session._dtype].append((peak, attending))
            roofs[name].append(((products + attention) / peak, products / peak + attention / attending))
    plain = times["eager, float32"]
    rows = {name: summary(times[name], plain, *map(list, zip(*roofs[name], strict=True))) for name in sessions}
    medians = {
        str(dtype): [statistics.median(kind) / 1e12 for kind in zip(*found, strict=True)] for dtype, found in reached.items()
    }
    card = {
        **runtime.describe_machine(),
        "threads": args.threads,
        "turns": args.turns,
        "gflop_of_a_frame": {"attention": attention / 1e9, "all else": products / 1e9},
        "tflops_p50_of_products_and_attention": medians,
        "engines": rows,
    }
    if args.busy:
        *_, compiled, _merged = sessions.values()
        card["beside_a_busy_process"] = beside_a_busy_process(compiled, args.busy)
    write_json(args.out, card)
    print({key: value for key, value in card.items() if key != "engines"})
    for name, row in rows.items():
        print(f"{name:36} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""python -m tests.benchmarks.cpu: the engines of *rooms* on this CPU, frame by frame in turns with the plain engine in float32.

Before every turn the machine is asked what its products reach then: on a host with other guests that changes by the second. All
passes of a frame, its decoding and its commit are counted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import worldmodel
from worldmodel import runtime
from worldmodel.action import Action
from worldmodel.game.stats import percentiles, write_json
from worldmodel.measure import work_of_action
from worldmodel.session import WorldSession

CPU = torch.device("cpu")
HELD = Action(frozenset({"forward"}))
ROOT = Path(__file__).parents[2]


def engines(world: str, threads: int) -> dict[str, WorldSession]:
    """Sessions by name, each with a full memory."""
    best = runtime.pick_dtype(CPU)
    wanted = {"eager, float32": (torch.float32, "off", False)}
    for dtype in dict.fromkeys((torch.float32, best)):
        for merge in (False, True):
            name = f"compiled, {str(dtype).removeprefix('torch.')}{', merged commit' if merge else ''}"
            wanted[name] = dtype, "on", merge
    made = {}
    for name, (dtype, compile_, merge) in wanted.items():
        session = worldmodel.load(world, device="cpu", threads=threads, dtype=dtype, compile=compile_, merge=merge)
        for _ in range(session.cache.until_full):
            frame(session)
        made[name] = session
    return made


def frame(session: WorldSession) -> None:
    session.step(HELD)
    session.finish()


def summary(seconds: list[float], plain: list[float], share: list[float]) -> dict[str, Any]:
    return {
        "frames_per_second": len(seconds) / sum(seconds),
        **{f"{name}_ms": value for name, value in percentiles([s * 1e3 for s in seconds], (50, 95)).items()},
        "times_float32_eager": sum(plain) / sum(seconds),
        "times_float32_eager_p50": statistics.median(p / t for p, t in zip(plain, seconds, strict=True)),
        "share_of_roof_p50": statistics.median(share),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cpu", description=__doc__)
    parser.add_argument("--world", default=str(ROOT / "assets/worlds/rooms"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cpu.json"))
    args = parser.parse_args(argv)
    sessions = engines(args.world, args.threads)
    work = work_of_action(sessions["eager, float32"])
    roofs: dict[torch.dtype, list[float]] = {session._dtype: [] for session in sessions.values()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    shares: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(args.turns):
        for name, session in sessions.items():
            peak = runtime.matmul_peak(CPU, session._dtype, tries=1)
            seconds = runtime.timed(lambda s=session: frame(s))  # type: ignore[misc]
            roofs[session._dtype].append(peak)
            times[name].append(seconds)
            shares[name].append(work / seconds / peak)
    plain = times["eager, float32"]
    rows = {name: summary(times[name], plain, shares[name]) for name in sessions}
    card = {
        **runtime.describe_machine(),
        "threads": args.threads,
        "turns": args.turns,
        "products_tflops_p50": {str(dtype): statistics.median(found) / 1e12 for dtype, found in roofs.items()},
        "engines": rows,
    }
    write_json(args.out, card)
    print({key: value for key, value in card.items() if key != "engines"})
    for name, row in rows.items():
        print(f"{name:36} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

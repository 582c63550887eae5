"""`python -m tests.benchmarks.kernels`: every kernel against the best that PyTorch offers, on the GPU at hand, in a few minutes.

First every op runs its tests (tests.kernel_cases); one that fails them is not timed. The same holds for a shape at which our result
differs from that of the rivals. Speed is TFLOP/s or GB/s, with its share of the peak measured in the same run, and how many times
faster than the best rival ours is. Exit status 1 if an op was refused, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.kernel_jobs import JOBS, Job
from tests.benchmarks.timing import Work, measure, peaks
from tests.kernel_cases import BIG, CASES, run
from tests.kernel_checks import TOLERANCE, Errors, allowed, error
from worldmodel import kernels

TESTED = (torch.bfloat16, torch.float16)
Runner = Callable[[str, torch.device, torch.dtype, int], Errors]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels", description=__doc__)
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/kernels.json"), help="where the numbers go")
    made.add_argument("--only", nargs="+", default=list(kernels.KERNELS), choices=list(kernels.KERNELS), help="ops")
    made.add_argument("--shapes", default="", help="part of a shape's name")
    made.add_argument("--seconds", type=float, default=280, help="start no further shape after this time")
    made.add_argument("--list", action="store_true", help="say what would be timed, and stop")
    return made


def refusal(op: str, device: torch.device, seed: int, runner: Runner = run) -> str:
    """Why `op` may not be timed, or an empty string: the first of its cases that fails."""
    names = [name for name in CASES | BIG if name.split(" ")[0] == op]
    if not names:
        return "it has no test"
    for name in names:
        for dtype in TESTED:
            try:
                errors = runner(name, device, dtype, seed)
            except Exception as problem:  # whatever a broken kernel raises: it is the finding
                return f"{name} in {dtype}: {type(problem).__name__}: {str(problem)[:200]}"
            bad = {part: size for part, size in errors.items() if not size <= allowed(name, dtype)}
            if bad:
                return f"{name} in {dtype}: {bad}"
    return ""


def contest(contenders: dict[str, Work]) -> tuple[dict[str, Work], dict[str, str]]:
    """Those that run here, and why others do not. Raises ValueError if ours differs from most of the rivals."""
    results: dict[str, Any] = {}
    dropped = {}
    for name, work in contenders.items():
        try:
            results[name] = work()
            torch.cuda.synchronize()
        except Exception as problem:  # a backend that does not take the shape, in any of its ways to say so
            if name == "triton":
                raise
            dropped[name] = f"{type(problem).__name__}: {str(problem)[:120]}"
    ours = results["triton"]
    differing = {}
    for name, result in results.items():
        if name != "triton" and isinstance(ours, Tensor) and isinstance(result, Tensor):
            size = error(ours, result)
            if not size <= TOLERANCE[torch.bfloat16]:
                differing[name] = size
    if differing and 2 * len(differing) >= len(results) - 1:
        raise ValueError(f"the result differs from that of {differing}")
    return {name: contenders[name] for name in results}, dropped | {n: f"differs by {e:.3g}" for n, e in differing.items()}


def result_of(job: Job, times: dict[str, float], dropped: dict[str, str], peak: dict[str, float]) -> dict[str, Any]:
    """One line of the report from seconds per run."""
    rivals = {name: seconds for name, seconds in times.items() if name != "triton" and name not in dropped}
    best = min(rivals, key=lambda name: rivals[name], default=None)
    unit, work, top = ("TFLOP/s", job.flops / 1e12, peak["tflops"]) if job.flops else ("GB/s", job.moved / 1e9, peak["gbs"])
    speed = work / times["triton"]
    return {
        "op": job.op,
        "shape": job.shape,
        "status": "timed",
        "microseconds": {name: 1e6 * seconds for name, seconds in times.items()},
        "dropped": dropped,
        "speed": speed,
        "unit": unit,
        "share_of_peak": speed / top,
        "best_rival": best,
        "times_faster_than_best": rivals[best] / times["triton"] if best else None,
    }


def describe(result: dict[str, Any]) -> str:
    head = f"{result['op']:16} {result['shape']:28}"
    if result["status"] != "timed":
        return f"{head} {result['status']}: {result['why']}"
    ratio = result["times_faster_than_best"]
    against = f"{ratio:5.2f} x {result['best_rival']}" if ratio else "no rival ran"
    line = f"{head} {result['microseconds']['triton']:10.1f} us {result['speed']:8.1f} {result['unit']:8}"
    return f"{line} {result['share_of_peak']:6.1%} of peak  {against}"


def bench(jobs: list[Job], device: torch.device, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Results of all jobs; ops that fail their tests are refused."""
    begun, peak = time.monotonic(), peaks()
    print(f"{torch.cuda.get_device_name()}: {peak['tflops']:.0f} TFLOP/s bf16, {peak['gbs']:.0f} GB/s, seed {seed}", flush=True)
    refused = {op: refusal(op, device, seed) for op in dict.fromkeys(job.op for job in jobs)}
    results: list[dict[str, Any]] = []
    for job in jobs:
        why, status = refused[job.op], "refused"
        if not why and time.monotonic() - begun > seconds:
            why, status = f"{seconds:.0f} s are over", "skipped"
        if not why:
            try:
                contenders, dropped = contest(job.make(device))
                results.append(result_of(job, measure(contenders, job.graphs), dropped, peak))
            except (RuntimeError, ValueError) as problem:
                why = f"{type(problem).__name__}: {str(problem)[:200]}"
        if why:
            results.append({"op": job.op, "shape": job.shape, "status": status, "why": why})
        print(describe(results[-1]), flush=True)
        torch.compiler.reset()  # each shape is compiled for itself, however many came before
        torch.cuda.empty_cache()
    return results


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    jobs = [job for job in JOBS if job.op in args.only and args.shapes in job.shape]
    if args.list:
        for job in jobs:
            print(f"{job.op:16} {job.shape:28} {job.flops / 1e12:8.3f} TFLOP {job.moved / 1e9:8.3f} GB")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: kernels are timed on a GPU only (see --list for what would be)", file=sys.stderr)
        return 2
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    results = bench(jobs, torch.device("cuda", torch.cuda.current_device()), args.seconds, seed)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "seed": seed}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(result["status"] == "refused" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

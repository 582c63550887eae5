"""`python -m tests.benchmarks.kernel_tiles`: which tiles of the attention kernels are fastest on the GPU at hand.

Prints the best few per shape; what wins belongs into `ring_tiles` and `block_tiles`. Tiles that do not fit the GPU are left out.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from unittest import mock

import torch

from tests.benchmarks.kernel_jobs import JOBS, Job
from tests.benchmarks.timing import measure
from worldmodel.kernels.triton_tiles import Tiles

SHOWN = 4


def candidates(narrow: bool) -> list[Tiles]:
    """Tiles worth trying; narrow: for few queries."""
    rows, warps = ((16, 32, 64), (4,)) if narrow else ((64, 128), (4, 8))
    return [Tiles(*choice) for choice in product(rows, (32, 64, 128), warps, (2, 3, 4))]


def timed(job: Job, device: torch.device, target: str, make: object) -> float | None:
    """Seconds of one run with the function `target` replaced, or None where the tiles do not fit."""
    with mock.patch(target, make):
        try:
            return measure({"triton": job.make(device)["triton"]}, job.graphs)["triton"]
        except Exception as problem:  # out of registers or shared memory, in whatever words
            print(f"  left out: {type(problem).__name__}", file=sys.stderr)
            return None


def ring_times(job: Job, device: torch.device) -> dict[str, float]:
    """Seconds by tiles of the ring kernel."""
    found = {}
    for tiles in candidates(narrow="rooms" in job.shape):
        seconds = timed(job, device, "worldmodel.kernels.triton_ring.ring_tiles", lambda *_, t=tiles: t)
        if seconds is not None:
            found[str(tiles)] = seconds
    return found


def block_times(job: Job, device: torch.device) -> dict[str, float]:
    """Seconds by tiles of one of the three block kernels at a time, the others as they are."""
    from worldmodel.kernels.triton_blocks_op import block_tiles

    found = {}
    for which, tiles in product(range(3 if "backward" in job.shape else 1), candidates(narrow=False)):

        def chosen(head: int, arch: int, which: int = which, tiles: Tiles = tiles) -> tuple[Tiles, ...]:
            usual = list(block_tiles(head, arch))
            usual[which] = tiles
            return tuple(usual)

        seconds = timed(job, device, "worldmodel.kernels.triton_blocks_op.block_tiles", chosen)
        if seconds is not None:
            found[f"{('forward', 'keys', 'queries')[which]} {tiles}"] = seconds
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernel_tiles", description=__doc__)
    parser.add_argument("--shapes", default="", help="part of a shape's name")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: tiles are chosen on a GPU only", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    for job in JOBS:
        if job.op in ("ring_attention", "block_attention") and args.shapes in job.shape:
            found = ring_times(job, device) if job.op == "ring_attention" else block_times(job, device)
            print(f"{job.op} {job.shape}")
            for kernel in ("Tiles",) if job.op == "ring_attention" else ("forward", "keys", "queries"):
                mine = sorted((seconds, name) for name, seconds in found.items() if name.startswith(kernel))
                for seconds, name in mine[:SHOWN]:
                    print(f"  {1e6 * seconds:10.1f} us  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

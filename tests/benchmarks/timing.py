"""Times on a GPU that can be compared: contenders take turns, a CUDA graph replays the launches, peaks are measured beside."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Work = Callable[[], object]
ROUNDS = 5  # turns of every contender
SPAN = 0.02  # seconds a turn should last


def graphed(work: Work, calls: int) -> Work | None:
    """`calls` runs of `work` as one CUDA graph, or None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def once(work: Work) -> float:
    """Seconds of one run by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(contenders: dict[str, Work], graphs: bool) -> dict[str, float]:
    """Seconds a run of each contender: the median over turns taken one after the other. graphs: leave the host's launches out."""
    turns: dict[str, tuple[Work, int]] = {}
    for name, work in contenders.items():
        for _ in range(3):
            work()
        calls = max(1, min(50, int(SPAN / max(once(work), 1e-6))))
        replay = graphed(work, calls) if graphs else None

        def repeat(work: Work = work, calls: int = calls) -> None:
            for _ in range(calls):
                work()

        turns[name] = (replay or repeat, calls)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (run, calls) in turns.items():
            times[name].append(once(run) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def peaks() -> dict[str, float]:
    """What this GPU does at best: bf16 matrix products in TFLOP/s, copies in GB/s (read and write counted)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    times = measure({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, graphs=False)
    return {"tflops": 2 * 8192**3 / times["product"] / 1e12, "gbs": 2 * 4 * 2**28 / times["copy"] / 1e9}

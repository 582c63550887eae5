"""Engines of one session, timed one after the other in one run.

An action counts as answered when its pictures have been handed over; the commit that follows is part of the rate. Decoding and the
copy to the host are always counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.flop_counter import FlopCounterMode

from worldmodel import runtime
from worldmodel.action import NOOP
from worldmodel.errors import DeviceError
from worldmodel.game.stats import peak_rss_mb, percentiles
from worldmodel.session import WorldSession
from worldmodel.video_session import VideoSession

Session = WorldSession | VideoSession
SETTLE = 3  # steps that are not timed once the cache is full
COMPILE, MERGED = "torch.compile", " + merged commit"
EVERY = 5.0  # s between two lines about the same work


class Progress:
    """What is being done now, a line each, with the seconds since the beginning."""

    def __init__(self, out: TextIO | None = None) -> None:
        """out: None is silence."""
        self._out, self._begun, self._told = out, time.perf_counter(), 0.0

    def say(self, words: str) -> None:
        """Something new begins, or is finished."""
        self._told = time.perf_counter()
        if self._out is not None:
            print(f"{self._told - self._begun:6.1f} s  {words}", file=self._out, flush=True)

    def still(self, words: str) -> None:
        """How far the work has come; told every few seconds."""
        if time.perf_counter() - self._told > EVERY:
            self.say(words)


def measure(
    session: Session,
    engines: list[str],
    steps: int,
    progress: Progress | None = None,
    measured: Callable[[dict[str, Any]], None] = lambda card: None,
) -> dict[str, Any]:
    """The results of `session`: every engine of `engines` (``eager``, ``graphs``, ``compiled``, ``torch.compile``; with
    `MERGED` behind its name in throughput mode), one after the other, over `steps` actions with a full cache.

    An engine that cannot be had has the reason in its row, as ``failed``. measured: is given them after every engine.
    """
    device, progress = session._device, progress or Progress()
    progress.say("measuring the peak of matrix products")
    card: dict[str, Any] = {
        **runtime.describe_machine(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "device": device.type,
        "dtype": session.dtype,
        "threads": torch.get_num_threads(),
        "load_average_before": _load(),
        "model": session.name,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "size": f"{session.size[1]}x{session.size[0]}",
        "window": session.config.sampler.window,
        "steps": session.steps,
        "frames_per_action": session.frames_per_action,
        "commit_counted": True,
        "decode_counted": True,
        "actions_timed": steps,
        "matmul_peak_tflops": runtime.matmul_peak(device, session._dtype) / 1e12,
    }
    work = _flops(session, progress)
    card |= {"tflop_per_action": work / 1e12, "load_average_after": None, "engines_asked": engines, "engines": {}}
    for number, name in enumerate(engines, 1):
        try:
            _switch(session, name, progress)
            row = _measure(session, name, steps, progress)
        except (DeviceError, RuntimeError) as error:  # what compilers and full memories raise; the other engines may do
            row = {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
            told = row["failed"]
        else:
            row["roof_share"] = work / (row["p50_ms"] / 1e3) / (card["matmul_peak_tflops"] * 1e12)
            row["times_eager"] = card["engines"].get("eager", {}).get("p50_ms", row["p50_ms"]) / row["p50_ms"]
            told = f"{row['frames_per_second']:.4g} frames/s, p50 {row['p50_ms']:.4g} ms, p95 {row['p95_ms']:.4g} ms an action"
        card["engines"][name], card["load_average_after"] = row, _load()
        measured(card)
        progress.say(f"{number}/{len(engines)} {name}: {told}")
    return card


def _switch(session: Session, engine: str, progress: Progress) -> None:
    session.use_eager()
    session.merge = engine.endswith(MERGED)
    if engine == COMPILE:
        plain = session.model.velocity
        steady = torch.compile(plain, dynamic=False)

        def velocity(*args: Any, **kwargs: Any) -> torch.Tensor:  # not compiled anew for every fill of the cache
            return (steady if session.cache.full else plain)(*args, **kwargs)

        session.model.velocity = velocity  # type: ignore[method-assign]
        progress.say(f"{engine}: once the cache is full, compiling takes minutes")
    elif not engine.startswith("eager"):
        progress.say(f"{engine}: making the engine ready")
        session.start_compile()
        while session.poll_compile() == "building":
            progress.still(f"{engine}: building, about a minute a pass, once")
            time.sleep(0.2)
        session.use_compiled()


def _act(session: Session) -> tuple[float, float]:
    """Seconds until the pictures of one action are there, and until the next action can begin."""
    begun = time.perf_counter()
    session.step(NOOP)
    shown = time.perf_counter() - begun
    session.finish()
    runtime.synchronize(session._device)
    return shown, time.perf_counter() - begun


def _flops(session: Session, progress: Progress) -> int:
    """Of one action with a full cache: products and convolutions, as PyTorch counts them."""
    progress.say("counting the work of an action")
    _fill(session, "counting", progress)
    with FlopCounterMode(display=False) as counter:
        _act(session)
    return int(counter.get_total_flops())


def _fill(session: Session, name: str, progress: Progress) -> float:
    """Begin, and play until the cache is full; seconds until the first dreamed picture."""
    device, cache = session._device, session.cache
    runtime.synchronize(device)
    begun = time.perf_counter()
    session.reset()
    if isinstance(session, WorldSession):
        session.step(NOOP)
    runtime.synchronize(device)
    first = time.perf_counter() - begun
    while not cache.full:
        progress.still(f"{name}: filling the cache, {cache.filled} of {cache.past} latents")
        _act(session)
    for _ in range(SETTLE):
        progress.still(f"{name}: the cache is full")
        _act(session)
    return first


def _measure(session: Session, engine: str, steps: int, progress: Progress) -> dict[str, Any]:
    device = session._device
    progress.say(f"{engine}: warming up")
    for _ in range(2 if engine.startswith("graphs") else 1):  # what is compiled at the first use; what is captured at the second
        _fill(session, engine, progress)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = _fill(session, engine, progress)
    progress.say(f"{engine}: timing {steps} actions")
    pairs = []
    for done in range(steps):
        progress.still(f"{engine}: {done} of {steps} actions timed")
        pairs.append(_act(session))
    shown, whole = ([pair[i] * 1e3 for pair in pairs] for i in (0, 1))
    return {
        "frames_per_second": session.frames_per_action * steps / sum(whole) * 1e3,
        **{f"{name}_ms": value for name, value in percentiles(whole).items()},
        "action_to_frame_ms": statistics.median(shown),
        "first_frame_ms": first * 1e3,
        "peak_memory_mb": _peak_memory_mb(device),
    }


def _peak_memory_mb(device: torch.device) -> float | None:
    """MiB: of the GPU since the engine began, of the process in all on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb()


def _load() -> float | None:
    """How many programs wanted a core in the last minute, ours among them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else None

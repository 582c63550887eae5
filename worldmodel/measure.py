"""Engines of one session, timed one after the other in one run.

An action counts as answered when its pictures have been handed over; the commit that follows is part of the rate. Decoding and the
copy to the host are always counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldmodel import kernels, runtime
from worldmodel.action import NOOP
from worldmodel.errors import DeviceError
from worldmodel.game.stats import peak_rss_mb, percentiles
from worldmodel.session import WorldSession
from worldmodel.video_session import VideoSession

Session = WorldSession | VideoSession
SETTLE = 3  # steps that are not timed once the cache is full, or another engine begins
COMPILE, MERGED = "torch.compile", " + merged commit"
TURNS, SHARE = 5, 4  # turns of an engine with the eager one, together so much fewer actions than are timed
EVERY = 10.0  # s between two lines about the same work


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


class Engines:
    """The engines of a session, which can be changed between two actions."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self.session, self.progress, self._velocity = session, progress, session.model.velocity
        self._compiled: Callable[..., torch.Tensor] | None = None

    def prepare(self, engine: str) -> None:
        """Whatever takes long. Raises DeviceError where there is no such engine."""
        session = self.session
        if engine.startswith("eager"):
            return
        self.progress.say(f"{engine}: making the engine ready")
        if engine == COMPILE:
            self._compiled = torch.compile(self._velocity, dynamic=False)
            self.progress.say(f"{engine}: once the cache is full, compiling takes minutes")
            return
        session.start_compile()
        while session.poll_compile() == "building":
            self.progress.still(f"{engine}: building, some seconds, once")
            time.sleep(0.2)

    def use(self, engine: str) -> None:
        """From the next action on. Raises DeviceError where that is not possible."""
        session = self.session
        session.use_eager()
        session.merge = engine.endswith(MERGED)
        session.model.velocity = self._steady if engine == COMPILE else self._velocity  # type: ignore[method-assign]
        if not engine.startswith("eager") and engine != COMPILE:
            session.use_compiled()

    def _steady(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compiled for a full cache, and not anew for every fill before."""
        assert self._compiled is not None
        return (self._compiled if self.session.cache.full else self._velocity)(*args, **kwargs)


def measure(
    session: Session,
    engines: list[str],
    steps: int,
    progress: Progress | None = None,
    measured: Callable[[dict[str, Any]], None] = lambda card: None,
) -> dict[str, Any]:
    """The results of `session`: every engine of `engines` (``eager``, ``graphs``, ``compiled``, ``torch.compile``; with
    `MERGED` behind its name in throughput mode), one after the other, over `steps` actions with a full cache. Each takes turns with
    the eager one, which ``times_eager`` compares it with: machines have other things to do.

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
    work = sum(work_of_action(session, progress).values())
    card |= {"tflop_per_action": work / 1e12, "load_average_after": None, "engines_asked": engines, "engines": {}}
    switch = Engines(session, progress)
    for number, name in enumerate(engines, 1):
        try:
            row = _measure(switch, name, steps)
        except (DeviceError, RuntimeError) as error:  # what compilers and full memories raise; the other engines may do
            row = {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
            told = row["failed"]
        else:
            row["roof_share"] = work / (row["p50_ms"] / 1e3) / (card["matmul_peak_tflops"] * 1e12)
            told = f"{row['frames_per_second']:.4g} frames/s, {row['p50_ms']:.4g} ms an action, {row['times_eager']:.3g} x eager"
        card["engines"][name], card["load_average_after"] = row, _load()
        measured(card)
        progress.say(f"{number}/{len(engines)} {name}: {told}")
    return card


def _act(session: Session) -> tuple[float, float]:
    """Seconds until the pictures of one action are there, and until the next action can begin."""
    begun = time.perf_counter()
    session.step(NOOP)
    shown = time.perf_counter() - begun
    session.finish()
    runtime.synchronize(session._device)
    return shown, time.perf_counter() - begun


def work_of_action(session: Session, progress: Progress | None = None) -> dict[str, int]:
    """FLOP of one action of an eager session with a full cache, by operation as PyTorch counts them: products, on a CPU with those
    of attention as ``aten.bmm``, and convolutions. It looks into neither our kernels nor its own attention for CPUs, which is done
    as products for once."""
    progress = progress or Progress()
    progress.say("counting the work of an action")
    plainly = sdpa_kernel(SDPBackend.MATH) if session.device == "cpu" else nullcontext()
    with kernels.chosen("reference"), plainly:
        _fill(session, "counting", progress)
        with FlopCounterMode(display=False) as counter:
            _act(session)
    return {str(operation): int(flop) for operation, flop in counter.get_flop_counts()["Global"].items()}


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


def _measure(engines: Engines, engine: str, steps: int) -> dict[str, Any]:
    session, progress = engines.session, engines.progress
    engines.prepare(engine)
    engines.use(engine)
    progress.say(f"{engine}: warming up")
    for _ in range(2 if engine.startswith("graphs") else 1):  # what is compiled at the first use; what is captured at the second
        _fill(session, engine, progress)
    if session.device == "cuda":
        torch.cuda.reset_peak_memory_stats(session._device)
    first = _fill(session, engine, progress)
    progress.say(f"{engine}: timing {steps} actions")
    pairs = _turn(engines, engine, steps)  # in one go: the first actions behind a change of engines are slower
    mine, beside, few = list[tuple[float, float]](), list[tuple[float, float]](), -(-steps // (TURNS * SHARE))
    for _ in range(min(TURNS, steps) if engine != "eager" else 0):
        progress.still(f"{engine}: in turns with the eager engine")
        mine += _turn(engines, engine, few)
        beside += _turn(engines, "eager", few)
    shown, whole = ([pair[i] * 1e3 for pair in pairs] for i in (0, 1))
    tenth = -(-steps // 10)
    return {
        "frames_per_second": session.frames_per_action * steps / sum(whole) * 1e3,
        **{f"{name}_ms": value for name, value in percentiles(whole).items()},
        "last_over_first": statistics.median(whole[-tenth:]) / statistics.median(whole[:tenth]),
        "action_to_frame_ms": statistics.median(shown),
        "first_frame_ms": first * 1e3,
        "times_eager": statistics.median(pair[1] for pair in beside or pairs)
        / statistics.median(pair[1] for pair in mine or pairs),
        "peak_memory_mb": _peak_memory_mb(session._device),
    }


def _turn(engines: Engines, engine: str, count: int) -> list[tuple[float, float]]:
    """So many actions; the first ones behind a change of engines are left out."""
    engines.use(engine)
    for _ in range(SETTLE):
        _act(engines.session)
    pairs = []
    for _ in range(count):
        engines.progress.still(f"{engine}: still timing")
        pairs.append(_act(engines.session))
    return pairs


def _peak_memory_mb(device: torch.device) -> float | None:
    """MiB: of the GPU since the engine began, what others keep there included; of the process in all on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb()


def _load() -> float | None:
    """How many programs wanted a core in the last minute, ours among them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else None

"""`play.py --bench`: engines of one world timed in one run, on one result card that anyone can compare.

An action counts as answered when its pictures have been handed over; the commit that follows is part of the rate. Decoding and the
copy to the host are always counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from worldmodel import runtime
from worldmodel.action import NOOP, ActionSpec
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig
from worldmodel.errors import ConfigError
from worldmodel.game.stats import peak_rss_mb, percentiles
from worldmodel.session import WorldSession
from worldmodel.video_session import VideoSession

Session = WorldSession | VideoSession
SETTLE = 3  # steps that are not timed once the cache is full
COMPILE, MERGED = "torch.compile", ", merged commit"


def random_video(device: torch.device, dtype: torch.dtype, window: int = 12) -> VideoSession:
    """The 1.3B network of Wan 2.1 at 832x480 with random weights, two steps and a commit a latent, and the tiny decoder."""
    from worldmodel.models.dit import DiT
    from worldmodel.models.wan.tiny_decoder import TinyDecoder

    net = DiTConfig(
        dim=1536, layers=30, heads=12, ffn_dim=8960, in_channels=16, out_channels=16, text_dim=4096, activation="gelu_tanh"
    )
    config = WorldConfig(
        name="random-1.3b",
        height=480,
        width=832,
        fps=16,
        family="wan",
        frames_per_latent=4,
        model=net,
        actions=ActionSpec(),
        codec=CodecConfig(kind="taehv"),
        sampler=SamplerConfig(kind="consistency", shift=5.0, presets=(1, 2, 4), steps=2, window=window, first_steps=4),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model, decoder = DiT(net).to(dtype), TinyDecoder().to(dtype)
    return VideoSession(config, model, decoder, [torch.randn(64, net.text_dim)], device, dtype)


def bench(
    session: Session, engines: list[str], steps: int, measured: Callable[[dict[str, Any]], None] = lambda card: None
) -> dict[str, Any]:
    """The result card of `session`: every engine of `engines` (``eager``, ``graphs``, ``compiled``, ``torch.compile``; with
    `MERGED` behind its name in throughput mode), one after the other, over `steps` actions with a full cache.

    measured: is given the card after every engine.
    """
    device = session._device
    card: dict[str, Any] = {
        **runtime.describe_machine(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "device": device.type,
        "dtype": session.dtype,
        "threads": torch.get_num_threads(),
        "model": session.name,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "size": f"{session.size[1]}x{session.size[0]}",
        "window": session.config.sampler.window,
        "steps": session.steps,
        "commit_counted": True,
        "decode_counted": True,
        "actions_timed": steps,
        "matmul_peak_tflops": runtime.matmul_peak(device, session._dtype) / 1e12,
    }
    work = _flops(session)
    card["tflop_per_action"] = work / 1e12
    card["engines"] = {}
    for name in engines:
        _switch(session, name)
        row = _measure(session, steps)
        row["roof_share"] = work / (row["p50_ms"] / 1e3) / (card["matmul_peak_tflops"] * 1e12)
        row["times_eager"] = card["engines"].get("eager", row)["p50_ms"] / row["p50_ms"]
        card["engines"][name] = row
        measured(card)
    return card


def text(card: dict[str, Any]) -> str:
    """The card for people."""
    lines = [f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}" for name, value in card.items()]
    lines = [line for line, name in zip(lines, card, strict=True) if name != "engines" and card[name] not in (None, "")]
    for engine, row in card["engines"].items():
        lines += ["", engine, *(f"  {name:<18} {value:.4g}" for name, value in row.items())]
    return "\n".join(lines)


def save(card: dict[str, Any], path: Path) -> None:
    """Write the card as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def run(world: str | None, size: str | None, device: str, steps: int, compiled: bool, force: bool, out: Path) -> int:
    """Build or load what is asked for, measure it, print the card and write it. Raises WorldModelErrors."""
    runtime.setup()
    place, _ = runtime.pick_device(device)
    session: Session
    if size is not None:
        if place.type == "cpu" and not force:
            raise ConfigError(f"--size {size} takes a GPU: on this CPU one frame lasts minutes (--force measures it all the same)")
        session = random_video(place, runtime.pick_dtype(place))
    else:
        from worldmodel import load

        session = load(str(world), device=device)
    engines = ["eager", "eager" + MERGED]
    if place.type == "cuda":
        engines += ["graphs", "graphs" + MERGED, COMPILE]  # the last: it replaces the network's pass
    elif compiled and isinstance(session, WorldSession):
        engines += ["compiled", "compiled" + MERGED]

    def keep(card: dict[str, Any]) -> None:
        """Large networks take minutes an engine: what is measured is told and kept at once."""
        engine, row = list(card["engines"].items())[-1]
        print(f"{len(card['engines'])}/{len(engines)} {engine}: {row['frames_per_second']:.4g} frames/s", file=sys.stderr)
        save(card, out)

    print(f"timing {', '.join(engines)}: {steps} actions each", file=sys.stderr)
    card = bench(session, engines, steps, keep)
    session.close()
    print(text(card))
    print(f"\nwritten to {out}", file=sys.stderr)
    return 0


def _switch(session: Session, engine: str) -> None:
    session.use_eager()
    session.merge = engine.endswith(MERGED)
    if engine == COMPILE:
        plain = session.model.velocity
        steady = torch.compile(plain, dynamic=False)

        def velocity(*args: Any, **kwargs: Any) -> torch.Tensor:  # not compiled anew for every fill of the cache
            return (steady if session.cache.full else plain)(*args, **kwargs)

        session.model.velocity = velocity  # type: ignore[method-assign]
    elif not engine.startswith("eager"):
        session.use_compiled()


def _act(session: Session) -> tuple[float, float]:
    """Seconds until the pictures of one action are there, and until the next action can begin."""
    begun = time.perf_counter()
    session.step(NOOP)
    shown = time.perf_counter() - begun
    session.finish()
    runtime.synchronize(session._device)
    return shown, time.perf_counter() - begun


def _flops(session: Session) -> int:
    """Of one action with a full cache: products and convolutions, as PyTorch counts them."""
    _fill(session)
    with FlopCounterMode(display=False) as counter:
        _act(session)
    return int(counter.get_total_flops())


def _fill(session: Session) -> float:
    """Begin, and play until the cache is full; seconds until the first dreamed picture."""
    device = session._device
    runtime.synchronize(device)
    begun = time.perf_counter()
    session.reset()
    if isinstance(session, WorldSession):
        session.step(NOOP)
    runtime.synchronize(device)
    first = time.perf_counter() - begun
    while not session.cache.full:
        _act(session)
    for _ in range(SETTLE):
        _act(session)
    return first


def _measure(session: Session, steps: int) -> dict[str, Any]:
    device = session._device
    _fill(session)  # whatever is captured or compiled at the first use
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = _fill(session)
    pairs = [_act(session) for _ in range(steps)]
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


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else None

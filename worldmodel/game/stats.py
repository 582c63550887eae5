"""Measured numbers of a run: honest, with their definitions.

frame_ms: time from one picture to the next (window: shown on the screen; headless: ready; pictures of one step share its time),
pauses left out. generate_ms: action read -> pictures on the host. denoise_ms, commit_ms, decode_ms: parts of a step, as the world
reports them; frames_per_action: pictures that a step makes. action_to_frame_ms: window: the
oldest key or mouse event of a step -> the first picture it changed is on the screen; headless, or an agent in the window: action
read -> picture ready, or shown.
window_s, first_frame_s: process start -> window open, -> first generated picture. missed_deadlines: pictures ready too late for an
even pace. All times are p50/p95/p99 over the run. fps is 1000 over the mean of frame_ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import DataError

_LOADED = time.time()
RECENT = 120


def process_age() -> float:
    """Seconds since this process started (where the system does not tell: since this module was imported)."""
    try:
        ticks = int(Path("/proc/self/stat").read_bytes().rsplit(b")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time() - _LOADED


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def percentiles(values: Sequence[float], which: tuple[int, ...] = (50, 95, 99)) -> dict[str, float | None]:
    """``{"p50": ...}``, rounded to 0.01; None without values."""
    if not values:
        return {f"p{p}": None for p in which}
    found = np.percentile(np.asarray(values, dtype=np.float64), which)
    return {f"p{p}": round(float(v), 2) for p, v in zip(which, found, strict=True)}


class Stats:
    """Collects times from the generator and the window. Thread-safe. Times in seconds in, milliseconds out."""

    PARTS = ("denoise", "commit", "decode")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: float | None = None
        self._intervals: list[float] = []
        self._generate: list[float] = []
        self._latency: list[float] = []
        self._parts: dict[str, list[float]] = {p: [] for p in self.PARTS}
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._recent_latency: deque[float] = deque(maxlen=RECENT)
        self.frames = 0
        self.missed = 0
        self.window_s: float | None = None
        self.first_frame_s: float | None = None

    def opened(self) -> None:
        """The window is on the screen."""
        self.window_s = round(process_age(), 3)

    def generated(self, seconds: float, count: int, timing_ms: Mapping[str, float]) -> None:
        """One step took `seconds` from action to pictures and made `count` pictures."""
        with self._lock:
            self.frames += count
            self._generate.append(seconds * 1000)
            for part in self.PARTS:
                if part in timing_ms:
                    self._parts[part].append(float(timing_ms[part]))

    def committed(self, seconds: float) -> None:
        """The finish pass after a step took `seconds`."""
        with self._lock:
            self._parts["commit"].append(seconds * 1000)

    def late(self) -> None:
        with self._lock:
            self.missed += 1

    def shown(self, now: float, latency: float | None, count: int = 1) -> None:
        """A picture was shown at `now` (headless: `count` pictures of a step are ready); latency: since its event, None without."""
        with self._lock:
            if self.first_frame_s is None:
                self.first_frame_s = round(process_age(), 3)
            if self._last is not None:
                passed = [(now - self._last) * 1000 / count] * count
                self._intervals += passed
                self._recent += passed
            self._last = now
            if latency is not None:
                self._latency.append(latency * 1000)
                self._recent_latency.append(latency * 1000)

    def pause(self) -> None:
        """The flow of pictures is interrupted on purpose: the next interval does not count."""
        with self._lock:
            self._last = None

    def fps(self, recent: bool = False) -> float | None:
        with self._lock:
            values = list(self._recent)[-40:] if recent else self._intervals
            mean = float(np.mean(values)) if values else 0.0
        return round(1000 / mean, 2) if mean > 0 else None

    def recent_intervals(self) -> list[float]:
        with self._lock:
            return list(self._recent)

    def recent_latency(self) -> dict[str, float | None]:
        with self._lock:
            return percentiles(list(self._recent_latency), (50, 95))

    def summary(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Everything for ``--stats``: `facts` about the world (world, device, dtype, steps ...), then the numbers."""
        fps = self.fps()
        with self._lock:
            parts = {f"{name}_ms": percentiles(values, (50,))["p50"] for name, values in self._parts.items()}
            return {
                **facts,
                "frames": self.frames,
                "fps": fps,
                "frame_ms": percentiles(self._intervals),
                "generate_ms": percentiles(self._generate),
                **parts,
                "action_to_frame_ms": percentiles(self._latency, (50, 95)),
                "missed_deadlines": self.missed,
                "window_s": self.window_s,
                "first_frame_s": self.first_frame_s,
                "peak_rss_mb": peak_rss_mb(),
            }


def result_line(summary: Mapping[str, Any]) -> str:
    """One line to copy and paste: the measured result with its conditions."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    frame, delay = summary["frame_ms"], summary["action_to_frame_ms"]
    steps = f"{summary['steps']} step{'s' if summary['steps'] != 1 else ''}, " if summary["steps"] else ""
    return (
        f"{summary['world']}: {number(summary['fps'])} fps over {summary['frames']} frames, "
        f"frame {number(frame['p50'])}/{number(frame['p95'])}/{number(frame['p99'])} ms (p50/p95/p99), "
        f"action to frame {number(delay['p50'])}/{number(delay['p95'])} ms (p50/p95), {steps}"
        f"{summary['device']} {summary['dtype']}, threads {summary['threads']}, {summary['engine']}, "
        f"peak {number(summary['peak_rss_mb'], 0)} MB"
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write atomically (temp file, fsync, rename). Raises DataError naming the file."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temp.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another file") from error

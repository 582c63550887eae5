"""Measured numbers of a run: honest, with their definitions.

A picture is shown when it is on the screen; headless: at the time it is due, which without a pace is when it is ready (pictures of
one step are spread over its time). Pauses are left out.

frame_ms: time from one picture to the next; jitter_ms: how far those times are from their median. generate_ms: action read ->
pictures on the host. denoise_ms, commit_ms, decode_ms: parts of a step, as the world reports them; frames_per_action: pictures
that a step makes. action_to_frame_ms: the oldest key or mouse event of a step -> the first picture it changed is shown; an agent's
event is the reading of its action. input_age_ms: the same for an input given at any moment between two readings, all alike (mean,
p50, p95); input_age_ratio: its mean over what no pacing can beat, the mean time to generate and half of the mean time between two
readings. missed_deadlines: steps whose pictures were ready only after their even place. window_s, first_frame_s: process start ->
window open, -> first generated picture. All other times are p50/p95/p99 over the run. fps is 1000 over the mean of frame_ms.
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
MOMENTS = (np.arange(10) + 0.5) / 10  # of the time between two readings, at which an input may have been given


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
        self._spans: list[tuple[float, float]] = []  # age of the newest and of the oldest input that a picture may show first
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

    def late(self) -> None:
        with self._lock:
            self.missed += 1

    def shown(self, now: float, event: float | None, span: tuple[float, float] | None = None) -> None:
        """A picture was shown at `now`. event: time of the oldest input it answers. span: inputs between these times reach it."""
        with self._lock:
            if self.first_frame_s is None:
                self.first_frame_s = round(process_age(), 3)
            if self._last is not None:
                passed = (now - self._last) * 1000
                self._intervals.append(passed)
                self._recent.append(passed)
            self._last = now
            if event is not None:
                self._latency.append((now - event) * 1000)
                self._recent_latency.append((now - event) * 1000)
            if span is not None:
                self._spans.append(((now - span[1]) * 1000, (now - span[0]) * 1000))

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
                "jitter_ms": self._jitter(),
                "generate_ms": percentiles(self._generate),
                **parts,
                "action_to_frame_ms": percentiles(self._latency, (50, 95)),
                **self._age(),
                "missed_deadlines": self.missed,
                "window_s": self.window_s,
                "first_frame_s": self.first_frame_s,
                "peak_rss_mb": peak_rss_mb(),
            }

    def _jitter(self) -> dict[str, float | None]:
        intervals = np.asarray(self._intervals)
        return percentiles(list(np.abs(intervals - np.median(intervals))) if len(intervals) else [])

    def _age(self) -> dict[str, Any]:
        if not self._spans:
            return {"input_age_ms": {"mean": None, **percentiles([], (50, 95))}, "input_age_ratio": None}
        newest, oldest = np.asarray(self._spans).T
        ages = newest[:, None] + (oldest - newest)[:, None] * MOMENTS
        mean, least = float(ages.mean()), float(np.mean(self._generate) + (oldest - newest).mean() / 2)
        age = {"mean": round(mean, 2), **percentiles(ages.ravel().tolist(), (50, 95))}
        return {"input_age_ms": age, "input_age_ratio": round(mean / least, 3)}


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

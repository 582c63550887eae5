"""What a run tells: the progress line, metrics.jsonl, plots, and the share of the machine's matmul peak."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

PLAIN_SECONDS = 10.0


def clock_text(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate_text(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.1f}"


class Averages:
    """Means of device scalars between two log lines, without waiting for the device in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means so far (this waits for the device), and start anew."""
        means = {n: float(s) / self._counts[n] for n, s in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class MetricsFile:
    """metrics.jsonl: one JSON object a line. After a resume, lines of steps that are done again are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        """step: optimiser steps already done; later lines of an earlier, interrupted run are removed."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a line cut by a kill is left out. Empty if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Speed:
    """Work done per second of training since the last reading; time spent on checkpoints and samples is not counted."""

    def __init__(self, flops: float, peak: float, tokens: int = 0) -> None:
        """flops: of one step. tokens: per target (0: tokens are not counted)."""
        self.flops, self.peak, self.tokens = flops, peak, tokens
        self._start, self._paused, self._targets, self._steps = time.perf_counter(), 0.0, 0, 0

    def count(self, targets: int) -> None:
        self._targets += targets
        self._steps += 1

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def take(self) -> dict[str, float]:
        """targets_per_s, tokens_per_s, tflops and share (of the measured matmul peak) of one process."""
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        tflops = self.flops * self._steps / seconds / 1e12
        row = {"targets_per_s": self._targets / seconds, "tflops": tflops, "share": tflops * 1e12 / self.peak}
        if self.tokens:
            row["tokens_per_s"] = row["targets_per_s"] * self.tokens
        self._start, self._paused, self._targets, self._steps = now, 0.0, 0, 0
        return row


class Console:
    """Progress for people: one line that renews itself on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._open = quiet, False
        self._live = sys.stdout.isatty()
        self._printed = -PLAIN_SECONDS

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            print(("\r\033[K" if self._open else "") + text, flush=True)
            self._open = False

    def progress(self, text: str) -> None:
        if self._quiet:
            return
        if self._live:
            print(f"\r\033[K{text}", end="", flush=True)
            self._open = True
        elif time.perf_counter() - self._printed >= PLAIN_SECONDS:
            print(text, flush=True)
            self._printed = time.perf_counter()

    def close(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False


def progress_text(row: dict[str, Any], fraction: float, remaining: float, total_steps: int | None) -> str:
    """The progress line of one metrics row."""
    of = f"/{total_steps}" if total_steps else ""
    parts = [
        f"step {row['step']}{of}",
        f"{100 * fraction:.0f} %",
        f"loss {row['loss']:.4f}",
        f"{rate_text(row['targets_per_s'])} targets/s",
    ]
    parts += [f"{rate_text(row['tokens_per_s'])} tokens/s"] if "tokens_per_s" in row else []
    parts.append(f"{row['tflops']:.3g} TFLOP/s = {100 * row['share']:.0f} % of matmul peak")
    parts += [f"lr {row['lr']:.2g}", f"ETA {clock_text(remaining)}"]
    return " · ".join(parts)


def plot(rows: list[dict[str, Any]], folder: Path, warn: Callable[[str], None]) -> None:
    """Redraw plots/*.png from metrics rows: one picture per group of curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    known = {"step", "seconds", "targets", "lr", "grad_norm", "targets_per_s", "tokens_per_s", "tflops", "share"}
    names = sorted({k for row in rows for k, v in row.items() if k not in known and isinstance(v, float | int)})
    groups = {"loss": [n for n in names if "loss" in n], "quality": [n for n in names if "loss" not in n]}
    groups |= {"speed": ["targets_per_s", "tokens_per_s"], "optimiser": ["lr", "grad_norm"]}
    for title, members in groups.items():
        drawn = [(n, [(r["step"], r[n]) for r in rows if isinstance(r.get(n), float | int)]) for n in members]
        drawn = [(n, points) for n, points in drawn if points]
        if not drawn:
            continue
        figure = Figure(figsize=(7, 2.6 * len(drawn)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axis, (name, points) in zip(axes, drawn, strict=True):
            axis.plot(*zip(*points, strict=True), linewidth=1)
            axis.set(xlabel="step", ylabel=name)
            axis.grid(alpha=0.3)
            if title == "loss" and min(p[1] for p in points) > 0:
                axis.set_yscale("log")
        try:
            figure.savefig(folder / f"{title}.png", dpi=100)
        except OSError as error:
            warn(f"could not draw {title}.png: {error}")

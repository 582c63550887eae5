"""When a run is over, when something is due, and when somebody asks it to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from train.config import RunConfig
from train.stage_options import TrainingOptions


@dataclass
class Budget:
    """When a run is over: after `steps` optimiser steps or `minutes` on its training clock, whichever is first."""

    steps: int | None
    minutes: float | None

    def spent(self, step: int, seconds: float) -> float:
        """Share in [0, 1] of the budget that is used up."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


@dataclass
class Every:
    """An event that is due every so many steps or minutes."""

    steps: int
    minutes: float
    last_seconds: float = field(default=0.0)

    def due(self, step: int, seconds: float) -> bool:
        due = bool(self.steps and step % self.steps == 0) or bool(self.minutes and seconds - self.last_seconds >= 60 * self.minutes)
        if due:
            self.last_seconds = seconds
        return due


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C or SIGTERM only fills the list; a second Ctrl-C interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # a sweep launcher's thread: signals go to the main one
        yield caught
        return

    def remember(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def budget(config: RunConfig, options: TrainingOptions) -> Budget:
    """From the top-level ``steps=`` and ``minutes=``, or else the stage's own number of steps."""
    steps = config.steps if config.steps is not None or config.minutes is not None else options.steps
    return Budget(steps, config.minutes)

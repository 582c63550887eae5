"""A progress line for long counts: tqdm if it is installed, else a plain line now and then. Writes to stderr."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Context manager; call `update(done, total)` as often as you like. every: seconds between plain lines."""

    def __init__(self, title: str, unit: str = "frames", every: float = 5.0) -> None:
        self.title, self.unit, self.every = title, unit, every
        self._start = self._told = time.monotonic()
        self._bar: Any = None
        self._first: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are finished."""
        if self._first is None:
            self._first = done
            if importlib.util.find_spec("tqdm") and sys.stderr.isatty():
                self._bar = importlib.import_module("tqdm").tqdm(total=total, desc=self.title, unit=self.unit[:-1], unit_scale=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._told >= self.every or done >= total:
            self._told = now
            rate = done / max(now - self._start, 1e-9)
            left = (total - done) / max(rate, 1e-9)
            print(f"{self.title}: {done}/{total} {self.unit}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

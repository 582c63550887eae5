"""`play`: one run of a world, in the window or without one, with signals, flushing and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from worldmodel.game.generator import Factory
from worldmodel.game.run import Run
from worldmodel.game.settings import Preview, Settings

PATIENCE = 10.0  # seconds that a step may take to end when the window closes


def play(factory: Factory, preview: Preview, settings: Settings) -> int:
    """Play until the window closes, the frames are done or a signal comes. Returns the exit code.

    0 done, 1 a replay diverged, 2 an error (already printed), 130 Ctrl-C, 143 terminated. Everything is flushed in each case.
    Raises WorldModelError for flags that cannot be met before anything runs.
    """
    return _headless(factory, preview, settings) if settings.headless else _windowed(factory, preview, settings)


def _headless(factory: Factory, preview: Preview, settings: Settings) -> int:
    run = Run(factory, preview, settings)
    generator, progress = run.generator, Progress()

    def ready() -> None:
        """Nobody looks: every picture counts as shown when it is due."""
        while (due := generator.delivery.next_due()) is not None:
            shown = generator.delivery.take(due)
            if shown is not None and not shown.first:
                run.stats.shown(shown.due, shown.event, shown.span)
        progress(generator.frame, generator.plan.frames, run.stats.fps(recent=True))

    generator.notify = ready
    with Signals(run):
        generator.run()
    progress.end()
    return run.finish()


def _windowed(factory: Factory, preview: Preview, settings: Settings) -> int:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    from worldmodel.game.loop import WindowLoop

    loop = WindowLoop(factory, preview, settings)
    thread = threading.Thread(target=loop.run.generator.run, name="generator", daemon=True)
    with Signals(loop.run):
        try:
            loop.open()
            thread.start()
            loop.play()
        finally:
            loop.run.generator.stop()
            loop.close()
            if thread.ident is not None:
                thread.join(PATIENCE if loop.run.generator.playing else 0.2)
    stuck = thread.is_alive()
    encoding = loop.shell.change.busy
    if stuck and loop.run.generator.journal is not None:
        loop.run.generator.journal.close()
    code = loop.run.finish()
    if stuck or encoding:  # still inside an import, a step or the text encoder: a normal exit would wait for it or crash in it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Signals:
    """While active, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) end the run after its current step; a second one, or one while
    loading, at once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._old: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        run = self._run
        again, run.signal = bool(run.signal), number
        run.generator.stop()
        if again or (run.settings.headless and not run.generator.playing):
            raise KeyboardInterrupt


class Progress:
    """One line on a terminal, rewritten a few times a second; silent elsewhere."""

    def __init__(self) -> None:
        self._on, self._last = sys.stderr.isatty(), 0.0

    def __call__(self, done: int, total: int | None, fps: float | None) -> None:
        now = time.monotonic()
        if self._on and now - self._last > 0.25:
            self._last = now
            of = f"/{total}" if total else ""
            print(f"\r{done}{of} frames, {fps or 0:.1f} fps \x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._on and self._last:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

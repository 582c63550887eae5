"""Which of a world's engines plays: the eager one, until the other (compiled code or CUDA graphs) is ready and takes over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from worldmodel.errors import DeviceError
from worldmodel.world import World


class Engines:
    """The engines of a world, between two steps and in the thread that owns it. Most worlds have one only; then nothing happens.

    playing: name of the one that plays. other: state of the other at the last look: ``off``, ``building``, ``ready``, ``slower`` or
    ``failed: reason``; empty for worlds with one engine only.
    """

    def __init__(self, world: World) -> None:
        self._world: Any = world
        self.playing = getattr(world, "engine", "") or "eager"
        self.other = ""

    def build_behind(self) -> None:
        """Begin to build the other engine, if there is one; the eager one plays meanwhile."""
        if self._look() == "off":
            self._world.start_compile()

    def wait(self, report: Callable[[float], None], stopped: Callable[[], bool]) -> bool:
        """Build the other engine and take it, or do nothing if it plays. report: hears a share in [0, 1).

        Returns whether it took over just now. Raises DeviceError if it cannot be built here.
        """
        if not self._look():
            raise DeviceError("this world has no compiled engine: leave out --compile on")
        if self.playing != "eager":
            return False
        self.build_behind()
        began, adopted = time.perf_counter(), False
        while (state := self._look()) == "building" and not stopped():
            elapsed = time.perf_counter() - began
            report(elapsed / (elapsed + 30.0))  # its length is unknown: approach the end
            time.sleep(0.05)
        if not stopped() and not state.startswith("failed"):
            adopted = self.adopt(always=True)
            state = self.other = self._look()
        if state.startswith("failed"):
            raise DeviceError(f"the compiled engine could not be built ({state[8:]}): play with --compile off")
        return adopted

    def adopt(self, always: bool = False) -> bool:
        """Take the other engine if it is ready and faster (or `always`). Returns whether it took over just now."""
        if self.playing != "eager":
            return False
        self.other = self._look()
        if self.other != "ready" or not self._world.adopt_compiled(always):
            return False
        self.playing = self._world.engine
        return True

    def _look(self) -> str:
        world = self._world
        return str(world.poll_compile() if hasattr(world, "poll_compile") else getattr(world, "compile_state", ""))

"""The heart of a run: asks for an action at the last moment, steps the world, hands the pictures over, lets the world commit.

The window runs it in a thread of its own and takes pictures out of `delivery`; headless runs call `run` directly. It alone
touches the world. Commands (pause, step, reset ...) take effect between two steps. Times are `time.perf_counter` seconds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from worldmodel.action import NOOP
from worldmodel.game.delivery import Delivery
from worldmodel.game.engines import Engines
from worldmodel.game.input import Snapshot
from worldmodel.game.journal import Journal
from worldmodel.game.replay import Replay, picture_hash
from worldmodel.game.settings import Plan
from worldmodel.game.stats import Stats
from worldmodel.world import Frame, World

Report = Callable[[str, float], None]
Factory = Callable[[Report], World]


class Driver(Protocol):
    """Whoever chooses the actions. `None` means: no more."""

    def next(self, now: float) -> Snapshot | None: ...

    def reset(self) -> None: ...


class Generator:
    """See the module. Public methods may be called from any thread; `run` is called once, from the thread that owns the world.

    Set by its thread, for others to read: world, journal and driver once they are there; stage: what it is loading, and which share
    of it is done; playing: the first picture is made; frame: pictures of this run so far; seed, spawn: where it began last; action:
    of the newest step; diverged: frame at which a replay was not exact; finished, error: how it ended. opened: called with the
    world once that is loaded, makes journal and driver. notify: called when any of this changed.
    """

    def __init__(
        self, factory: Factory, plan: Plan, stats: Stats, *, replay: Replay | None = None, notify: Callable[[], None] | None = None
    ) -> None:
        self.plan, self.stats, self.replay = plan, stats, replay
        self.world: World | None = None
        self.journal: Journal | None = None
        self.driver: Driver | None = None
        self.error: BaseException | None = None
        self.stage: tuple[str, float] = ("load", 0.0)
        self.engines: Engines | None = None
        self.delivery, self.action = Delivery(stats), NOOP
        start = next((op for op in replay.ops if op.kind == "reset"), None) if replay else None
        self.seed, self.spawn, self.frame = (start.seed, start.spawn, 0) if start else (plan.seed, plan.spawn, 0)
        self.diverged: int | None = None
        self.playing, self.finished, self.paused = False, False, False
        self._factory, self.notify = factory, notify or (lambda: None)
        self._cond = threading.Condition()
        self._commands: deque[Callable[[], object]] = deque()
        self._stop, self._steps = False, 0
        self.opened: Callable[[World], tuple[Journal, Driver]] | None = None
        self._found: dict[str, Any] = {}  # of a replay: what its prompts become

    @property
    def engine(self) -> str:
        """Name of the engine that plays."""
        return self.engines.playing if self.engines else "eager"

    @property
    def compiling(self) -> str:
        """State of the other engine, see `Engines`."""
        return self.engines.other if self.engines else ""

    # --- for the window -------------------------------------------------------------------------------------------------------
    def pause(self, on: bool) -> None:
        """Stop making pictures, or go on; single steps that were still to be made are forgotten."""
        with self._cond:
            self.paused, self._steps = on, 0
            self.delivery.interrupt()
            self._cond.notify_all()

    def step_once(self) -> None:
        """While paused: make one more step."""
        with self._cond:
            self._steps += 1
            self._cond.notify_all()

    def reset(self) -> None:
        """Start again at the same place."""
        self.command(lambda: self._reset(self.seed, self.spawn))

    def next_place(self) -> None:
        """Start at the next spawn; a world with one spawn takes the next seed instead."""

        def job() -> None:
            assert self.world is not None
            more = self.world.spawns > 1
            self._reset(self.seed if more else self.seed + 1, self.spawn + 1 if more else self.spawn)

        self.command(job)

    def note(self, event: str, **values: Any) -> None:
        """Write an event into the replay. Only from a command."""
        if self.journal is not None:
            self.journal.event(event, self.frame, **values)

    def command(self, job: Callable[[], object]) -> None:
        """Run a job in the generator's thread before the next step."""
        with self._cond:
            self._commands.append(job)
            self._cond.notify_all()

    def stop(self) -> None:
        """Finish the current step, close everything and leave `run`."""
        with self._cond:
            self._stop = True
            self._cond.notify_all()

    # --- the thread that owns the world -----------------------------------------------------------------------------------------
    def run(self) -> None:
        """Load, play until the plan, the driver or `stop` ends it, then flush and close. Errors are kept in `error`."""
        try:
            self._open()
            if self.replay is None:
                self._play()
            else:
                self._play_again(self.replay)
        except BaseException as error:  # carried to the main thread, which decides
            self.error = error
        for end in (self.journal, self.world):
            try:
                if end is not None:
                    end.close()
            except BaseException as error:
                self.error = self.error or error
        self.finished = True
        self.notify()

    def _open(self) -> None:
        self.world = self._factory(self._report)
        self.engines = Engines(self.world)
        if self.replay is not None:
            self._found = self.replay.check_world(self.world)
            if self.replay.header["engine"] not in ("", "eager"):
                self._compile_now()
        elif self.plan.compile == "on":
            self._compile_now()
        elif self.plan.compile == "auto":
            if self.plan.build:
                self.engines.build_behind()
            self._adopt()  # what is ready now plays from the first frame on
        if self.opened is not None:
            self.journal, self.driver = self.opened(self.world)
        self._report("warm", 0.5)

    def _report(self, stage: str, share: float) -> None:
        self.stage = (stage, share)
        self.notify()

    def _play(self) -> None:
        assert self.driver is not None
        self._reset(self.plan.seed, self.plan.spawn)
        frames = self.plan.frames
        while not self._stop and (frames is None or self.frame < frames):
            if not self._turn():
                continue
            if self.plan.compile != "off":
                self._adopt()
            snapshot = self.driver.next(time.perf_counter())
            if snapshot is None:
                return
            self._step(snapshot)

    def _play_again(self, replay: Replay) -> None:
        world: Any = self.world
        for op in replay.ops:
            if op.kind == "reset":
                shown = self._reset(op.seed, op.spawn)
                sha = picture_hash([shown.rgb])
            elif op.kind == "engine":
                self._compile_now()
                continue
            elif op.kind == "threads":
                world.set_threads(op.threads)
                continue
            elif op.kind == "prompt":
                self.spawn = world.add_prompt(self._found[op.text])
                continue
            else:
                while not self._stop and not self._turn():
                    pass
                if self._stop or op.action is None:
                    return
                now = time.perf_counter()
                sha = picture_hash([f.rgb for f in self._step(Snapshot(op.action, now, now))])
            if sha != op.sha or self.frame != op.frame:
                self.diverged = op.frame
                return

    def _reset(self, seed: int, spawn: int) -> Frame:
        assert self.world is not None
        self.delivery.clear()
        self.seed, self.spawn = seed, spawn % max(1, self.world.spawns)
        frame = self.world.reset(seed, self.spawn)
        if self.driver is not None:
            self.driver.reset()
        if self.journal is not None:
            self.journal.reset(self.frame, seed, self.spawn, frame)
        self.delivery.first(frame, self.frame, self._period())
        self.notify()
        self._report("play", 1.0)
        self.playing = True
        return frame

    def _turn(self) -> bool:
        """Wait until it is time to read the next action. False: something else happened, look again."""
        with self._cond:
            if self._commands:
                job = self._commands.popleft()
            elif self._stop:
                return False
            elif self.paused:
                if self._steps:
                    self._steps -= 1
                    return True
                self._cond.wait(0.5)
                return False
            else:
                wait = self.delivery.wait()
                if wait <= 0:
                    return True
                self._cond.wait(wait)
                return not (self._stop or self._commands or self.paused) and self.delivery.wait() <= 0
        job()
        return False

    def _step(self, snapshot: Snapshot) -> tuple[Frame, ...]:
        assert self.world is not None
        self.action = snapshot.action
        frames = self.world.step(snapshot.action)
        ready = time.perf_counter()
        self.frame += len(frames)
        finish = getattr(self.world, "finish", None)
        self.stats.generated(ready - snapshot.taken, len(frames), frames[-1].timing_ms)
        self.delivery.step(frames, snapshot, self.frame, self._period(), flows=not self.paused)
        self.notify()
        if finish is not None:
            finish()
        if self.journal is not None:
            self.journal.step(self.frame, snapshot.action, frames)
        if self.replay is None:
            self._review_threads(ready - snapshot.taken)
        return frames

    def _review_threads(self, seconds: float) -> None:
        """A world may find that another number of threads is faster by now."""
        world: Any = self.world
        if hasattr(world, "review_threads") and (count := world.review_threads(seconds)):
            self.delivery.forget()
            self.note("threads", threads=count)

    def _period(self) -> float:
        """Seconds between pictures; 0: as fast as it goes."""
        fps = self.plan.fps
        if fps is None:
            fps = float(self.world.fps) if self.world else 0.0
        return 1 / fps if fps else 0.0

    def _compile_now(self) -> None:
        """Wait until the other engine is ready and take it. Raises DeviceError if it cannot be built here."""
        assert self.engines is not None
        self._changed(self.engines.wait(lambda share: self._report("compile", share), lambda: self._stop))

    def _adopt(self) -> None:
        """Take the other engine once it is ready and faster."""
        assert self.engines is not None
        self._changed(self.engines.adopt())

    def _changed(self, engine: bool) -> None:
        """Say so in the replay if another engine plays from now on."""
        if engine:
            self.delivery.forget()
            self.note("engine", engine=self.engine)

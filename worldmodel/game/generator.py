"""The heart of a run: asks for an action at the last moment, steps the world, hands the pictures over, lets the world commit.

The window runs it in a thread of its own and reads pictures from a bounded mailbox; headless runs call `run` directly. It alone
touches the world. Commands (pause, step, reset ...) take effect between two steps. Times are `time.perf_counter` seconds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from worldmodel.action import NOOP
from worldmodel.errors import DataError, DeviceError
from worldmodel.game.input import Snapshot
from worldmodel.game.journal import Journal
from worldmodel.game.pacer import Pacer
from worldmodel.game.replay import Replay, picture_hash
from worldmodel.game.stats import Stats
from worldmodel.world import Frame, World

Report = Callable[[str, float], None]
Factory = Callable[[Report], World]


class Driver(Protocol):
    """Whoever chooses the actions. `None` means: no more."""

    def next(self, now: float) -> Snapshot | None: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What to run. frames: stop after so many pictures (None: never). fps: pace; None: the world's own; 0: as fast as it goes.

    compile: ``on`` waits for the world's other engine, ``auto`` takes it once it is there, ``off`` leaves it. build: whether
    ``auto`` may build one behind the game; when such a build is done is not reproducible.
    """

    seed: int = 0
    spawn: int = 0
    frames: int | None = None
    fps: float | None = None
    compile: str = "auto"
    build: bool = True


@dataclass(frozen=True)
class Shown:
    """A picture on its way to the screen. index: pictures of this run so far. due: when to show it. event: oldest input it answers.

    span: whatever was done between these two times shows first in this picture; None: in no particular one. first: the picture of a
    reset, which no step made.
    """

    rgb: np.ndarray
    index: int
    due: float
    event: float | None
    span: tuple[float, float] | None = None
    first: bool = False


class Generator:
    """See the module. Public methods may be called from any thread; `run` is called once, from the thread that owns the world."""

    def __init__(
        self, factory: Factory, plan: Plan, stats: Stats, *, replay: Replay | None = None, notify: Callable[[], None] | None = None
    ) -> None:
        self.plan, self.stats, self.replay = plan, stats, replay
        self.world: World | None = None
        self.journal: Journal | None = None
        self.driver: Driver | None = None
        self.error: BaseException | None = None
        self.stage: tuple[str, float] = ("load", 0.0)
        self.engine, self.compiling, self.action = "eager", "", NOOP
        start = next((op for op in replay.ops if op.kind == "reset"), None) if replay else None
        self.seed, self.spawn, self.frame = (start.seed, start.spawn, 0) if start else (plan.seed, plan.spawn, 0)
        self.diverged: int | None = None
        self.playing, self.finished, self.paused = False, False, False
        self._factory, self.notify = factory, notify or (lambda: None)
        self._cond = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stop, self._steps = False, 0
        self._pacer = Pacer()
        self._read: float | None = None  # when the action before was read, while play flows
        self._box: deque[Shown] = deque()
        self.opened: Callable[[World], tuple[Journal, Driver]] | None = None
        self._found: dict[str, Any] = {}  # of a replay: what its prompts become

    # --- for the window -------------------------------------------------------------------------------------------------------
    def take(self, now: float) -> Shown | None:
        """The newest picture that is due, or None. An older one that was never shown leaves its event to the next."""
        with self._cond:
            found: Shown | None = None
            while self._box and self._box[0].due <= now:
                found = _inherit(self._box.popleft(), found)
            return found

    def next_due(self) -> float | None:
        with self._cond:
            return self._box[0].due if self._box else None

    def pause(self, on: bool) -> None:
        with self._cond:
            self.paused, self._steps = on, 0
            self._interrupt()
            self._cond.notify_all()

    def step_once(self) -> None:
        """While paused: make one more step."""
        with self._cond:
            self._steps += 1
            self._cond.notify_all()

    def reset(self, spawn: int | None = None, seed: int | None = None) -> None:
        """Start again, at another place if one is given."""

        def job() -> None:
            self._reset(self.seed if seed is None else seed, self.spawn if spawn is None else spawn)

        self.command(job)

    def next_place(self) -> None:
        """Start at the next spawn; a world with one spawn takes the next seed instead."""

        def job() -> None:
            assert self.world is not None
            more = self.world.spawns > 1
            self._reset(self.seed if more else self.seed + 1, self.spawn + 1 if more else self.spawn)

        self.command(job)

    def change_prompt(self, text: str, found: Any) -> None:
        """Dream of `text` from the next step on; it becomes the place that a reset goes to. found: of the world's `find_prompt`."""

        def job() -> None:
            world: Any = self.world
            self.spawn = world.add_prompt(found)
            self.note("prompt", text=text)

        self.command(job)

    def note(self, event: str, **values: Any) -> None:
        """Write an event into the replay. Only from a command."""
        if self.journal is not None:
            self.journal.event(event, self.frame, **values)

    def command(self, job: Callable[[], None]) -> None:
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
        self.engine = getattr(self.world, "engine", "") or "eager"
        if self.replay is not None:
            for op in self.replay.ops:
                if op.action is not None:
                    self.world.actions.clean(op.action)
            world: Any = self.world
            window = getattr(world, "window", 0)
            self.replay.check_world(getattr(world, "weights_hash", ""), getattr(world, "steps", 0), window)
            self._found = self._find_prompts(self.replay)
        wants = self.replay.header["engine"] if self.replay else ""
        if (self.plan.compile == "on" and self.replay is None) or wants not in ("", "eager"):
            self._compile_now()
        elif self.plan.compile == "auto" and self.replay is None:
            if self.plan.build:
                self._compile_behind()
            self._adopt()  # what is ready now plays from the first frame on
        if self.opened is not None:
            self.journal, self.driver = self.opened(self.world)
        self._report("warm", 0.5)

    def _find_prompts(self, replay: Replay) -> dict[str, Any]:
        """What a replay's prompts become, by text, before it begins. Raises DataError for a world that takes none."""
        world: Any = self.world
        texts = {op.text for op in replay.ops if op.kind == "prompt"}
        if texts and not getattr(world, "takes_prompts", False):
            raise DataError(f"{replay.path} changes the prompt, but this world takes none: replay it with the world that made it")
        return {text: world.find_prompt(text) for text in texts}

    def _report(self, stage: str, share: float) -> None:
        self.stage = (stage, share)
        self.notify()

    def _play(self) -> None:
        assert self.driver is not None
        self._reset(self.plan.seed, self.plan.spawn)
        while not self._stop and not self._full():
            if not self._turn():
                continue
            if self.plan.compile != "off":
                self._adopt()
            snapshot = self.driver.next(time.perf_counter())
            if snapshot is None:
                return
            self._step(snapshot)

    def _full(self) -> bool:
        return self.plan.frames is not None and self.frame >= self.plan.frames

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
        with self._cond:
            self._box.clear()  # pictures of the old place must not follow the new one
            self._interrupt()
        self.seed, self.spawn = seed, spawn % max(1, self.world.spawns)
        frame = self.world.reset(seed, self.spawn)
        if self.driver is not None:
            self.driver.reset()
        if self.journal is not None:
            self.journal.reset(self.frame, seed, self.spawn, frame)
        with self._cond:
            self._put(Shown(np.array(frame.rgb), self.frame, self._pacer.first(self._period()), None, first=True), 1)
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
                wait = self._pacer.wait()
                if wait <= 0:
                    return True
                self._cond.wait(wait)
                return not (self._stop or self._commands or self.paused) and self._pacer.wait() <= 0
        job()
        return False

    def _interrupt(self) -> None:
        """The flow of pictures ends here on purpose; what comes next starts a new one. The caller holds the lock."""
        self._pacer.restart()
        self._read = None
        self.stats.pause()

    def _step(self, snapshot: Snapshot) -> tuple[Frame, ...]:
        assert self.world is not None
        self.action = snapshot.action
        frames = self.world.step(snapshot.action)
        ready = time.perf_counter()
        self.frame += len(frames)
        finish = getattr(self.world, "finish", None)
        self.stats.generated(ready - snapshot.taken, len(frames), frames[-1].timing_ms)
        self._hand_over(frames, snapshot)
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
            self._pacer.forget()
            self.note("threads", threads=count)

    def _hand_over(self, frames: tuple[Frame, ...], snapshot: Snapshot) -> None:
        """Put the pictures of a step into the mailbox, each with its place in time."""
        count, flows = len(frames), not self.paused
        with self._cond:
            places = self._pacer.place(snapshot.taken, count, self._period())
            if places.late:
                self.stats.late()
            span = (self._read, snapshot.taken) if self._read is not None else None
            self._read = snapshot.taken if flows else None
            if not flows:
                self._pacer.restart()
            for i, (frame, due) in enumerate(zip(frames, places.due, strict=True)):
                index, first = self.frame - count + 1 + i, i == 0
                self._put(Shown(np.array(frame.rgb), index, due, snapshot.event if first else None, span if first else None), count)
        self.notify()

    def _put(self, shown: Shown, count: int) -> None:
        """The mailbox holds the new pictures and those of the step before that may not be due yet; a full one loses its oldest."""
        self._box.append(shown)
        if len(self._box) > 2 * count - 1:
            old = self._box.popleft()
            self._box[0] = _inherit(self._box[0], old)

    def _period(self) -> float:
        """Seconds between pictures; 0: as fast as it goes."""
        fps = self.plan.fps
        if fps is None:
            fps = float(self.world.fps) if self.world else 0.0
        return 1 / fps if fps else 0.0

    # --- the other engine ---------------------------------------------------------------------------------------------------------
    def _compile_behind(self) -> None:
        """Begin to build the world's other engine, if it offers one; the eager one plays meanwhile."""
        world: Any = self.world
        if self._compile_state() == "off":
            world.start_compile()

    def _compile_state(self) -> str:
        """``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``; empty for worlds with one engine only."""
        world: Any = self.world
        return str(world.poll_compile() if hasattr(world, "poll_compile") else getattr(world, "compile_state", ""))

    def _compile_now(self) -> None:
        """Wait until the other engine is ready and take it. Raises DeviceError if it cannot be built here."""
        if not self._compile_state():
            raise DeviceError("this world has no compiled engine: leave out --compile on")
        if self.engine != "eager":
            return
        self._compile_behind()
        began = time.perf_counter()
        while (state := self._compile_state()) == "building" and not self._stop:
            elapsed = time.perf_counter() - began
            self._report("compile", elapsed / (elapsed + 30.0))  # its length is unknown: approach the end
            time.sleep(0.05)
        if not self._stop and not state.startswith("failed"):
            self._adopt(always=True)
            state = self.compiling = self._compile_state()
        if state.startswith("failed"):
            raise DeviceError(f"the compiled engine could not be built ({state[8:]}): play with --compile off")

    def _adopt(self, always: bool = False) -> None:
        """Between two steps: take the other engine once it is ready (and, or `always`, faster), and say so in the replay."""
        world: Any = self.world
        if self.engine != "eager":
            return
        self.compiling = self._compile_state()
        if self.compiling == "ready" and world.adopt_compiled(always):
            self.engine = world.engine
            self._pacer.forget()
            self.note("engine", engine=self.engine)


def _inherit(newer: Shown, older: Shown | None) -> Shown:
    """A picture that replaces one never shown answers its events too."""
    if older is None:
        return newer
    events = [e for e in (older.event, newer.event) if e is not None]
    spans = [s for s in (older.span, newer.span) if s is not None]
    return replace(newer, event=min(events, default=None), span=(spans[0][0], spans[-1][1]) if spans else None)

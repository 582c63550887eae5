"""One run of a world, the part that window and headless share: who drives, what is written down, how it ends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from worldmodel import __version__
from worldmodel.errors import DataError, WorldModelError
from worldmodel.game.agents import Agent, RandomAgent, open_agent
from worldmodel.game.generator import Factory, Generator
from worldmodel.game.input import InputState, Snapshot
from worldmodel.game.journal import Journal
from worldmodel.game.keymap import Keymap, default_keymap, load_keymap
from worldmodel.game.recording import EpisodeRecording
from worldmodel.game.replay import ReplayWriter, read_replay, replay_path
from worldmodel.game.settings import Plan, Preview, Settings
from worldmodel.game.stats import Stats, result_line, write_json
from worldmodel.world import World

HEADLESS_FRAMES = 100


class Seat:
    """Who holds the controls: ``player``, ``agent``, or ``demo`` (the agent, until a person touches anything)."""

    def __init__(self, inputs: InputState, agent: Agent, mode: str, hand_back: bool) -> None:
        self.inputs, self.agent, self.mode = inputs, agent, mode
        self._hand_back = hand_back

    def next(self, now: float) -> Snapshot | None:
        if self.mode == "player":
            return self.inputs.snapshot(now)
        action = self.agent.act()
        if action is not None:
            return Snapshot(action, now, now)
        if not self._hand_back:
            return None
        self.mode = "player"
        return self.inputs.snapshot(now)

    def reset(self) -> None:
        self.agent.reset()


class Run:
    """Puts a generator together and ends it well. `print` lines go to stdout, failures to stderr."""

    def __init__(self, factory: Factory, preview: Preview, settings: Settings, notify: Any = None) -> None:
        self.preview, self.settings = preview, settings
        taken = {settings.replay.resolve(): "--replay"} if settings.replay else {}
        for flag, path in (("--record", settings.record), ("--stats", settings.stats)):
            if path is not None:
                _check_place(path)
                if path.resolve() in taken:
                    raise DataError(f"{taken[path.resolve()]} and {flag} name the same file {path}: give each its own")
                taken[path.resolve()] = flag
        replay = read_replay(settings.replay) if settings.replay else None
        if replay and replay.note:
            print(f"note: {replay.note}", file=sys.stderr)
        if preview.spec is not None:  # fail before the world is loaded
            self._keymap(preview.spec)
            if settings.agent:
                open_agent(settings.agent, preview.spec)
        self.stats = Stats()
        fps = settings.fps if settings.fps is not None else (0.0 if settings.headless else None)
        plan = Plan(settings.seed, settings.spawn, self._frames(), fps, settings.compile, build=not settings.headless)
        self.generator = Generator(factory, plan, self.stats, replay=replay, notify=notify or (lambda: None))
        self.generator.opened = self._opened
        self.seat: Seat | None = None
        self.inputs: InputState | None = None
        self.keymap: Keymap | None = default_keymap(preview.spec) if preview.spec else None
        self.signal = 0

    def _frames(self) -> int | None:
        settings = self.settings
        if settings.frames is None and settings.headless and settings.agent in (None, "idle", "random"):
            return HEADLESS_FRAMES
        return settings.frames

    def _keymap(self, spec: Any) -> Keymap:
        return load_keymap(self.settings.keymap, spec) if self.settings.keymap else default_keymap(spec)

    def _opened(self, world: World) -> tuple[Journal, Seat]:
        """In the generator's thread, once the world is there."""
        settings, spec = self.settings, world.actions
        self.keymap = self._keymap(spec)
        self.inputs = InputState(spec, self.keymap, self.facts(world)["frames_per_action"])
        for note in self.keymap.notes:
            print(f"note: key left out, {note}", file=sys.stderr)
        agent = open_agent(settings.agent, spec, settings.seed) if settings.agent else self._spare_agent(spec)
        mode = "agent" if settings.headless or settings.agent else "player"
        if settings.headless and not settings.agent:
            agent = open_agent("idle", spec)
        self.seat = Seat(self.inputs, agent, mode, hand_back=not settings.headless)
        journal = self._journal(world)
        print("\n".join([start_line(self.facts(), world), *(f"  {line}" for line in getattr(world, "placement", ()))]), flush=True)
        return journal, self.seat

    def _spare_agent(self, spec: Any) -> Agent:
        """Who plays after Tab, or when nobody presses a key: the world's demo, else a wanderer."""
        if self.preview.demo is not None:
            return open_agent(str(self.preview.demo), spec)
        return RandomAgent(spec, self.settings.seed)

    def _journal(self, world: World) -> Journal:
        settings, header = self.settings, self.header(world)
        writer = episodes = None
        if settings.replay_out is not None and settings.replay is None:
            image = {"image": self.preview.image} if self.preview.image else {}
            writer = ReplayWriter(replay_path(settings.replay_out, world.name), {**header, **image})
        if settings.episodes is not None:
            meta = {"recorded_by": "play", "source": self.preview.source}
            episodes = EpisodeRecording(settings.episodes, world.name, world.actions, world.fps, meta)
        journal = Journal(header, world.size, world.fps, writer, episodes)
        if settings.record is not None:
            journal.start_video(settings.record)
        return journal

    def header(self, world: World) -> dict[str, Any]:
        """What a replay must know to be played again and checked."""
        facts = self.facts(world)
        return {key: value for key, value in facts.items() if key != "headless"}

    def facts(self, world: World | None = None) -> dict[str, Any]:
        """About the world and its conditions; plain JSON. Worlds that are no network have 0 steps and no weights."""
        found: Any = world or self.generator.world
        size = getattr(found, "size", self.preview.size)
        return {
            "world": getattr(found, "name", self.preview.name),
            "source": self.preview.source,
            "weights": getattr(found, "weights_hash", ""),
            "device": getattr(found, "device", "cpu"),
            "dtype": getattr(found, "dtype", "uint8"),
            "steps": getattr(found, "steps", 0),
            "frames_per_action": getattr(found, "frames_per_action", 1),
            "threads": getattr(found, "threads", 1),
            **{name: getattr(found, name) for name in ("window", "decoder") if hasattr(found, name)},  # of video worlds
            "engine": self.generator.engine,
            "merge": getattr(found, "merge", False),
            "seed": self.generator.seed,
            "spawn": self.generator.spawn,
            "size": [int(s) for s in size],
            "native_fps": getattr(found, "fps", None),
            "headless": self.settings.headless,
            "versions": _versions(),
        }

    def finish(self) -> int:
        """After the generator has ended: write the numbers, say what there is to say, and return the exit code."""
        generator, settings = self.generator, self.settings
        error = generator.error
        try:
            if generator.world is not None:
                self._report()
        except WorldModelError as failure:
            error = error or failure
        if error is not None and not isinstance(error, KeyboardInterrupt):
            return self._failed(error)
        if self.signal or isinstance(error, KeyboardInterrupt):
            return 128 + (self.signal or signal.SIGINT)
        if generator.replay is not None and generator.playing:
            if generator.diverged is not None:
                print(f"diverged at frame {generator.diverged}")
                return 1
            whole = generator.frame == generator.replay.frames
            print(f"exact: {generator.frame} frames" + ("" if whole else f" of {generator.replay.frames} (stopped early)"))
        if settings.agent is None and settings.headless and settings.frames is None and generator.replay is None:
            print(f"note: stopped after {HEADLESS_FRAMES} frames; choose another number with --frames", file=sys.stderr)
        return 0

    def _report(self) -> None:
        summary = self.stats.summary(self.facts())
        if self.stats.frames:
            print(result_line(summary))
        journal = self.generator.journal
        if journal is not None:
            if journal.replay is not None:
                print(f"replay: {journal.replay.path}")
            for path in journal.videos:
                print(f"video: {path}")
            if journal.episodes is not None:
                print(f"episodes: {journal.episodes.saved} in {journal.episodes.folder}")
        if self.settings.stats is not None:
            write_json(self.settings.stats, summary)
            print(f"stats: {self.settings.stats}")

    def _failed(self, error: BaseException) -> int:
        if isinstance(error, WorldModelError):
            print(f"error: {error}", file=sys.stderr)
            return 2
        first = (str(error).strip() or "no message").splitlines()[0]
        short = isinstance(error, MemoryError) or any(w in str(error).lower() for w in ("out of memory", "allocate memory"))
        hint = "; there is not enough memory: try another --device or a smaller world" if short else ""
        kind, log = type(error).__name__, self._log(error)
        print(f"error: the world stopped with {kind}: {first}{hint}; details are in {log}", file=sys.stderr)
        return 2

    def _log(self, error: BaseException) -> str:
        text = "".join(traceback.format_exception(error))
        try:
            self.settings.plays.mkdir(parents=True, exist_ok=True)
            path = replay_path(self.settings.plays, "error", ".log")
            path.write_text(text, encoding="utf-8")
        except (OSError, DataError):
            print(text, file=sys.stderr)
            return "the lines above"
        return str(path)


def start_line(facts: dict[str, Any], world: World) -> str:
    """What is about to be played, and on what."""
    height, width = world.size
    steps = f", {facts['steps']} steps" if facts["steps"] else ""
    note = getattr(world, "device_note", "")
    device = f"{facts['device']} {facts['dtype']}" + (f" ({note})" if note else "")
    return (
        f"worldmodel {__version__}: {facts['world']} {width}x{height} at {world.fps:g} fps, {device}, threads {facts['threads']}"
        f"{steps}, {facts['engine']}, seed {facts['seed']}, spawn {facts['spawn']}"
    )


def _check_place(path: Path) -> None:
    """Raises DataError if a file cannot be written there; better now than after an hour of play."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another file") from error
    if path.exists() and not path.is_file():  # a device or pipe would be replaced by the finished file
        raise DataError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no plain file'}; choose another file")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"cannot write {path}: permission denied; choose another file")


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """Of what the pictures may depend on; read from package metadata, nothing is imported."""
    found = {
        "worldmodel": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in ("numpy", "torch", "pygame-ce"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

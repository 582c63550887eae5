"""What a run was asked to be: the door's flags, checked, and what is known of the world before it is loaded. No pygame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worldmodel.action import ActionSpec


@dataclass(frozen=True)
class Preview:
    """The world as the window shows it while it loads.

    name: short name. source: what opens it again (name, folder, ``real:NAME``). picture: image file of its first place, or None.
    spec: its actions if known yet. size: (H, W). demo: a file of actions that is played when nobody presses a key. image: a picture
    to start with instead of the world's own, as text, kept in replays. rests: see `WorldConfig`.
    """

    name: str
    source: str
    title: str = ""
    picture: Path | None = None
    spec: ActionSpec | None = None
    size: tuple[int, int] = (80, 128)
    demo: Path | None = None
    image: str = ""
    rests: float = 0.0


@dataclass(frozen=True)
class Settings:
    """The flags of ``play.py`` (see its ``--help``), as values.

    fps: None is the world's own pace (headless: as fast as it goes), 0 is as fast as it goes. agent: idle, random, a file, or None.
    """

    seed: int = 0
    spawn: int = 0
    headless: bool = False
    frames: int | None = None
    agent: str | None = None
    record: Path | None = None
    stats: Path | None = None
    replay: Path | None = None
    replay_out: Path | None = Path("plays")
    episodes: Path | None = None
    scale: int | None = None
    fullscreen: bool = False
    fps: float | None = None
    compile: str = "auto"
    keymap: Path | None = None
    hud: bool = True

    @property
    def plays(self) -> Path:
        """Where screenshots and videos go."""
        return self.replay_out or Path("plays")


@dataclass(frozen=True)
class Plan:
    """The part of the settings that the generator keeps to.

    frames: stop after so many pictures (None: never). fps: pace; None: the world's own; 0: as fast as it goes.
    compile: ``on`` waits for the world's other engine, ``auto`` takes it once it is there, ``off`` leaves it. build: whether
    ``auto`` may build one behind the game; when such a build is done is not reproducible.
    """

    seed: int = 0
    spawn: int = 0
    frames: int | None = None
    fps: float | None = None
    compile: str = "auto"
    build: bool = True

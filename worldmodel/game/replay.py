"""Replay files: every run can be played again and checked picture by picture.

JSONL. First a header (``"event": "header"``), then one line a step ``{"frame": k, "action": {...}, "sha": "..."}`` and event lines:
``reset`` (seed, spawn, sha of the first picture), ``engine`` (another engine took over before the next step), ``threads`` (so many
CPU threads from the next step on), ``prompt`` (text: the world dreams of it from the next step on), ``driver`` (a person or the
agent took over; for information). ``frame`` is the count of pictures in the whole run; sha is the first 16 hex digits of the
SHA-256 of the pictures' RGB bytes. A run that began with a picture of the player's has it in the header (``image``, a PNG in
base64). Lines reach the disk at least once a second, so a kill loses at most that.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from worldmodel.action import Action
from worldmodel.errors import DataError, WorldModelError

SCHEMA_VERSION = 1
FLUSH_SECONDS = 1.0
_HEADER_KEYS = {"world": str, "source": str, "weights": str, "seed": int, "spawn": int, "steps": int, "engine": str}


def picture_hash(pictures: Iterable[np.ndarray]) -> str:
    """First 16 hex digits of the SHA-256 of the pictures' RGB bytes, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()[:16]


class ReplayWriter:
    """Appends lines to a new replay file. Raises DataError if the disk refuses."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._flushed = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] | None = path.open("x", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot write the replay {path}: {reason}; choose a folder with --replay-out") from error
        self._write({"event": "header", "schema_version": SCHEMA_VERSION, **header}, flush=True)

    def reset(self, frame: int, seed: int, spawn: int, picture: np.ndarray) -> None:
        self._write({"event": "reset", "frame": frame, "seed": seed, "spawn": spawn, "sha": picture_hash([picture])}, flush=True)

    def event(self, name: str, frame: int, **values: Any) -> None:
        self._write({"event": name, "frame": frame, **values}, flush=True)

    def step(self, frame: int, action: Action, pictures: Iterable[np.ndarray]) -> None:
        self._write({"frame": frame, "action": action.to_json(), "sha": picture_hash(pictures)})

    def close(self) -> None:
        """Safe to call twice."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                os.fsync(file.fileno())

    def _write(self, line: Mapping[str, Any], flush: bool = False) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            now = time.monotonic()
            if flush or now - self._flushed >= FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot write the replay {self.path}: {reason}; free some space or use --no-replay") from error


@dataclass(frozen=True)
class Op:
    """One line of a replay. kind: ``reset``, ``step``, ``engine``, ``threads`` or ``prompt``. frame: pictures made by its end."""

    kind: str
    frame: int
    action: Action | None = None
    sha: str = ""
    seed: int = 0
    spawn: int = 0
    engine: str = ""
    text: str = ""
    threads: int = 0


@dataclass(frozen=True)
class Replay:
    """A whole replay file. note: empty, or what was odd about it (a last line cut off by a kill)."""

    path: Path
    header: dict[str, Any]
    ops: tuple[Op, ...]
    note: str = ""

    @property
    def frames(self) -> int:
        return max((op.frame for op in self.ops), default=0)

    def check_world(self, world: Any) -> dict[str, Any]:
        """What the prompts of the replay become in this world, by text. Raises WorldModelError if it was made with another world.

        Weights, step count and window (of video worlds) must be those that it was made with, and its actions known.
        """
        for op in self.ops:
            if op.action is not None:
                world.actions.clean(op.action)
        made, has = self.header["weights"], getattr(world, "weights_hash", "")
        if made != has:
            raise DataError(
                f"{self.path} was made with weights {made[:12] or 'none'} but this world has {has[:12] or 'none'}: "
                "replay it with the version of the world that made it"
            )
        steps, window = getattr(world, "steps", 0), getattr(world, "window", 0)
        if self.header["steps"] != steps:
            raise DataError(f"{self.path} was made with {self.header['steps']} denoising steps, not {steps}: leave out --steps")
        if window and self.header.get("window", window) != window:
            raise DataError(f"{self.path} was made with a window of {self.header['window']}, not {window}: leave out --window")
        prompts = {op.text for op in self.ops if op.kind == "prompt"}
        if prompts and not getattr(world, "takes_prompts", False):
            raise DataError(f"{self.path} changes the prompt, but this world takes none: replay it with the world that made it")
        return {text: world.find_prompt(text) for text in prompts}


def is_replay(path: Path) -> bool:
    """Whether the file starts with a replay header."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("event") == "header"


def read_replay(path: Path) -> Replay:
    """Read and check every line. A cut-off last line is dropped with a note; any other damage raises DataError with its line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the replay {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a replay: it is not a text file") from error
    note = ""
    tail = lines.pop()
    if tail and lines:  # every whole line ends with a newline
        note = f"the last line of {path} was cut off and is left out"
    elif tail:
        lines = [tail]
    header = _header(path, lines[0] if lines else "")
    ops: list[Op] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            op = _op(json.loads(line), ops[-1].frame if ops else 0)
        except (ValueError, KeyError, TypeError, RecursionError, WorldModelError) as error:
            raise DataError(f"{path}, line {number} is damaged ({error}): record the replay again") from error
        if op:
            ops.append(op)
    if not ops:
        raise DataError(f"{path} holds no picture, the run ended before its first: there is nothing to replay")
    if ops[0].kind == "step":
        raise DataError(f"{path}, line 2 is damaged (the first picture is missing): record the replay again")
    return Replay(path, header, tuple(ops), note)


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a replay: its first line is not a replay header") from error
    if not isinstance(header, dict) or header.get("event") != "header":
        raise DataError(f"{path} is not a replay: its first line is not a replay header")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path} has replay version {header.get('schema_version')}, this client reads version {SCHEMA_VERSION}")
    for key, kind in _HEADER_KEYS.items():
        if not isinstance(header.get(key), kind) or isinstance(header[key], bool):
            raise DataError(f"{path}, line 1 is damaged (header key {key!r}): record the replay again")
    threads, device = header.get("threads", 1), header.get("device", "cpu")
    if not isinstance(device, str) or not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise DataError(f"{path}, line 1 is damaged (header key 'threads' or 'device'): record the replay again")
    window, decoder = header.get("window", 1), header.get("decoder", "auto")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1 or decoder not in ("auto", "gpu", "cpu"):
        raise DataError(f"{path}, line 1 is damaged (header key 'window' or 'decoder'): record the replay again")
    return header


def _op(line: Any, last: int) -> Op | None:
    """One parsed line -> Op; None for lines that are only information. `last` is the frame count before it."""
    if not isinstance(line, dict) or not isinstance(line["frame"], int):
        raise ValueError("not a replay line")
    frame, kind = line["frame"], line.get("event", "step")
    if kind == "step":
        if frame <= last:
            raise ValueError(f"frame {frame} does not follow frame {last}")
        return Op("step", frame, action=Action.from_json(line["action"]), sha=_text(line["sha"]))
    if frame != last:
        raise ValueError(f"frame {frame} instead of {last}")
    if kind == "reset":
        return Op("reset", frame, sha=_text(line["sha"]), seed=_integer(line["seed"]), spawn=_integer(line["spawn"]))
    if kind == "engine":
        return Op("engine", frame, engine=_text(line["engine"]))
    if kind == "threads":
        return Op("threads", frame, threads=_integer(line["threads"]))
    if kind == "prompt":
        return Op("prompt", frame, text=_text(line["text"]))
    return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def replay_path(folder: Path, name: str, suffix: str = ".jsonl") -> Path:
    """A new file name in `folder` made of a name and the time; never one that exists."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for extra in ("", *(f"-{i}" for i in range(2, 1000))):
        path = folder / f"{stem}{extra}{suffix}"
        if not os.path.lexists(path):  # false for a name that is too long: opening it will tell
            return path
    raise DataError(f"{folder} holds too many files named {stem}: clear it or use --replay-out")

"""TrainState: all that resume needs, in one private file per checkpoint. Public weights are another matter (train.export).

Randomness is derived from the seed and the step, so no generator state is kept.
"""

from __future__ import annotations

import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from worldmodel.errors import CheckpointError

VERSION = 1
_DAMAGE: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
)
_DAMAGE += (pickle.UnpicklingError, zipfile.BadZipFile, MemoryError, OverflowError)
_NAME = re.compile(r"step-(\d{9})\.pt")


@dataclass
class TrainState:
    """step: optimiser steps done. seconds: training clock. targets: frames learnt from. fits: what the run is (stage, shapes).

    modules, ema, optimisers: state dicts by target name. stage: what a stage wants to keep.
    """

    step: int = 0
    seconds: float = 0.0
    targets: int = 0
    fits: str = ""
    modules: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Any] = field(default_factory=dict)
    optimisers: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)


def _files(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; temporary leftovers of a kill do not match."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def save(folder: Path, state: TrainState, keep: int, sound: int | None = None) -> Path:
    """Write ``folder/step-N.pt`` atomically and remove all but the newest `keep`. Raises OSError (for example a full disk).

    sound: newest step whose weights are known to be good; the newest checkpoint up to there is kept, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        leftover.unlink(missing_ok=True)
    path = folder / f"step-{state.step:09d}.pt"
    temporary = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            # The shallow dict keeps tensors uncopied; asdict would clone hundreds of megabytes.
            torch.save({"version": VERSION, **{k: getattr(state, k) for k in TrainState.__dataclass_fields__}}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # torch's writer when the disk refuses
        raise CheckpointError(f"{path} could not be written ({str(error)[:120]}): free some space, then run again") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(folder)
    proven = [p for p in _files(folder) if sound is not None and _step(p) <= sound][-1:]
    for old in _files(folder)[:-keep]:
        if old not in proven:
            old.unlink(missing_ok=True)
    return path


def set_aside(folder: Path, sound: int) -> int | None:
    """Rename the checkpoints behind step `sound` to ``*.collapsed``, which no run reads; returns the newest step left, if any."""
    for path in _files(folder):
        if _step(path) > sound:
            path.replace(path.with_name(f"{path.name}.collapsed"))
    left = _files(folder)
    return _step(left[-1]) if left else None


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder; there the rename alone must do
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> TrainState:
    """Read one checkpoint onto the CPU. Raises CheckpointError that names the file and the reason."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    if not isinstance(data, dict) or data.pop("version", None) != VERSION or set(data) != set(TrainState.__dataclass_fields__):
        raise CheckpointError(f"{path} is no training checkpoint of version {VERSION}")
    return TrainState(**data)


def load_latest(folder: Path, report: Callable[[str], None]) -> TrainState | None:
    """The newest checkpoint that loads; what was skipped is told to `report`. None if there is none at all.

    Raises CheckpointError if there are checkpoints and none of them loads.
    """
    paths = _files(folder)
    for path in reversed(paths):
        try:
            return load(path)
        except CheckpointError as error:
            report(f"skipped {error}")
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read: delete the folder to start anew")
    return None

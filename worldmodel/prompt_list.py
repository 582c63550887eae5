"""The prompts of a video world's folder by their texts; each is a starting place. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from worldmodel.config import WorldConfig
from worldmodel.errors import CheckpointError, ConfigError

FOLDER = "prompts"


@dataclass(frozen=True)
class Entry:
    """A prompt of a folder. encoder: id of the text encoder that made its embedding ("" = unknown). file: of the embedding."""

    text: str
    encoder: str
    file: Path


def entries(folder: Path) -> list[Entry]:
    """Every prompt, in order; empty for a world without prompts. Raises CheckpointError for a damaged file."""
    found = []
    for path in sorted((folder / FOLDER).glob("[0-9]*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            found.append(Entry(str(said["text"]), str(said.get("encoder") or ""), path.with_suffix(".safetensors")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not say the prompt's text ({error}): make it again") from error
    return found


def find(folder: Path, wanted: str) -> int | None:
    """Which starting place a prompt is, asked for by its text or number; None if it is not there."""
    for i, entry in enumerate(entries(folder)):
        if wanted in (entry.text, str(i)):
            return i
    return None


def check_number(wanted: str, count: int, name: str) -> None:
    """Raise ConfigError for a bare number, which means a starting place and no text, of the world `name`, which has `count`."""
    if wanted.strip().isdecimal() and not 0 <= int(wanted) < count:
        there = f"the prompts 0 to {count - 1}" if count > 1 else "one prompt, number 0"
        raise ConfigError(f"the world {name!r} has {there}, and no number {int(wanted)}: give a number that is there, or words")


def number(folder: Path, wanted: str) -> int:
    """As `find`, but raises ConfigError if it is not there."""
    known, name = entries(folder), WorldConfig.load(folder).name
    if not known:
        raise ConfigError(f"the world {name!r} takes no prompt: choose a starting place with --spawn")
    if not wanted.strip():
        raise ConfigError("the prompt is empty: give some words, or leave out --prompt")
    found = find(folder, wanted.strip())
    if found is not None:
        return found
    check_number(wanted, len(known), name)
    listed = "; ".join(f"{i}: {entry.text[:50]}" for i, entry in enumerate(known))
    raise ConfigError(
        f"the world {name!r} holds no embedding of the prompt {wanted[:60]!r}: give one of these ({listed}), or add yours "
        "with python -m worldmodel.checkpoint prompt (it needs the text encoder)"
    )

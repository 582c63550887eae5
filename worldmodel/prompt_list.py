"""The prompts of a video world's folder by their texts; each is a starting place. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from worldmodel.errors import CheckpointError, ConfigError

FOLDER = "prompts"


def texts(folder: Path) -> list[str]:
    """The text of every prompt, in order; empty for a world without prompts. Raises CheckpointError for a damaged file."""
    found = []
    for path in sorted((folder / FOLDER).glob("[0-9]*.json")):
        try:
            found.append(str(json.loads(path.read_text(encoding="utf-8"))["text"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} does not say the prompt's text ({error}): make it again") from error
    return found


def number(folder: Path, wanted: str) -> int:
    """Which starting place a prompt is, asked for by its text or number. Raises ConfigError if it is not there."""
    known = texts(folder)
    if not known:
        raise ConfigError(f"the world {folder.name!r} takes no prompt: choose a starting place with --spawn")
    for i, text in enumerate(known):
        if wanted in (text, str(i)):
            return i
    listed = "; ".join(f"{i}: {text[:50]}" for i, text in enumerate(known))
    raise ConfigError(
        f"the world {folder.name!r} holds no embedding of the prompt {wanted[:60]!r}: give one of these ({listed}), or add yours "
        "with python -m worldmodel.checkpoint prompt (it needs the text encoder)"
    )

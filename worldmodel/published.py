"""Published video worlds by name: where their files lie and how they are played (worldmodel/cards/NAME.json). No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldmodel.errors import ConfigError
from worldmodel.plain import from_dict, to_dict

CARDS = Path(__file__).parent / "cards"


@dataclass(frozen=True)
class Source:
    """A file of a public repository. revision: branch, tag or commit.

    size (bytes), sha256, licence: as they were known when the card was written; 0 and "" are unknown, then the hub's word counts.
    """

    repo: str
    file: str
    revision: str = "main"
    size: int = 0
    sha256: str = ""
    licence: str = ""


@dataclass(frozen=True)
class VideoCard:
    """A published checkpoint of the family: its files on the hub, and how it is played.

    entry: which net of the model's file ("" = the only one). config: see `worldmodel.convert.named_config`. prompt: of the first
    start where none is given. memory_mb: expected peak in bfloat16, 0 = unknown. The rest as in WorldConfig and SamplerConfig.
    """

    title: str
    model: Source
    decoder: Source
    encoder: Source
    text_encoder: Source
    tokenizer: Source
    entry: str
    config: str
    prompt: str
    memory_mb: int
    chunk: int
    steps: int
    first_steps: int
    window: int
    sink: int
    height: int
    width: int
    fps: int
    rolling: bool = False

    @property
    def id(self) -> str:
        """Short hash of all that the card says."""
        said = {name: value for name, value in to_dict(self).items() if name != "rolling" or value}  # most do not speak of it
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def card_names() -> list[str]:
    """Names of the published worlds that this version knows."""
    return sorted(path.stem for path in CARDS.glob("*.json"))


def is_card(name: str) -> bool:
    """Whether `name` is a published world's, or the file of a card."""
    return name in card_names() or (name.endswith(".json") and Path(name).is_file())


def read_card(name: str) -> VideoCard:
    """The card of that name, or of a JSON file. Raises ConfigError."""
    path = CARDS / f"{name}.json" if name in card_names() else Path(name)
    if not path.is_file():
        raise ConfigError(f"no published world is called {name!r}: give one of {', '.join(card_names())}, or the file of a card")
    data = _json(path)
    parts = data.pop("parts", None)  # files that many worlds share
    if parts is not None:
        data = _json(CARDS / "parts" / f"{Path(str(parts)).name}.json") | data
    try:
        if (path.parent / str(data.get("config"))).is_file():  # beside the card
            data["config"] = str(path.parent / data["config"])
        return from_dict(VideoCard, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): correct it") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no card: it must be an object of names and values")
    return data

"""Prompts while a world is played: from its folder, the cache, or the text encoder, if it is here. Shapes: L tokens, D width."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from worldmodel.compiled import cache_folder
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.wan.prompts import PromptCache, PromptEncoder
from worldmodel.models.wan.text import layer_bytes
from worldmodel.prompt_list import FOLDER


def embed(texts: Sequence[str], encoder: Path, tokenizer: Path, device: str = "cpu") -> tuple[list[Tensor], str]:
    """Embeddings (L,D) of texts, from the cache or the text encoder, and the encoder's id, by which it is found again.

    device: where the text encoder runs; where that has no room after all, on the CPU. Raises CheckpointError, ConfigError.
    """
    prompts = PromptEncoder(encoder, tokenizer, device)
    try:
        made = _cache(prompts.id).embeddings(texts, prompts)
    except torch.OutOfMemoryError:
        made = _cache(prompts.id).embeddings(texts, PromptEncoder(encoder, tokenizer))
    _remember(prompts.id, encoder, tokenizer)
    return made, prompts.id


class PromptBook:
    """Text -> embedding (L,D) for one world. Thread-safe: it reads, and what it writes is whole.

    known: by text, what the world's folder holds. encoder: id of the text encoder that made it ("" = unknown). device: where that
    encoder runs; keep: it stays there once it was needed.
    """

    def __init__(self, known: Mapping[str, Tensor], encoder: str, device: str = "cpu", keep: bool = False) -> None:
        self._known, self.encoder = known, encoder
        self._device, self._keep = device, keep
        self._kept: PromptEncoder | None = None
        self._lock = Lock()

    def knows(self, text: str) -> bool:
        """Whether the text's embedding, or the text encoder, is on this machine."""
        kept = text in self._known or bool(self.encoder and _cache(self.encoder).path(text).is_file())
        return kept or _remembered(self.encoder) is not None

    def __call__(self, text: str) -> Tensor:
        """Takes up to minutes where the text encoder has to run. Raises ConfigError or CheckpointError where it cannot."""
        text = text.strip()
        if text in self._known:
            return self._known[text]
        if (cached := _cache(self.encoder).get(text) if self.encoder else None) is not None:
            return cached
        where = _remembered(self.encoder)
        if where is None:
            raise ConfigError(
                f"no embedding of {text[:40]!r} is here, nor the text encoder that makes one: "
                "add it with python -m worldmodel.checkpoint prompt, or start a published world with --prompt"
            )
        with self._lock:
            try:
                return self._embedded(text, where)
            except torch.OutOfMemoryError:  # somebody has taken the memory since it was planned with
                self._device, self._keep, self._kept = "cpu", False, None
                return self._embedded(text, where)

    def _embedded(self, text: str, where: tuple[Path, Path]) -> Tensor:
        prompts = self._kept or PromptEncoder(*where, self._device, keep=self._keep)
        if prompts.id != self.encoder:
            raise ConfigError(f"{where[0]} is not the text encoder of this world any more: download it again")
        self._kept = prompts if self._keep else None
        return _cache(prompts.id).embeddings([text], prompts)[0]


def encoder_sizes(encoder: str) -> tuple[int, int]:
    """Bytes of the file of the text encoder of that id and of its largest layer; zeros where it is not on this machine."""
    where = _remembered(encoder)
    try:
        return (0, 0) if where is None else (where[0].stat().st_size, layer_bytes(where[0]))
    except (CheckpointError, OSError):  # told when a prompt needs it
        return 0, 0


def _cache(encoder: str) -> PromptCache:
    return PromptCache(cache_folder() / FOLDER, encoder, lambda words: print(f"note: {words}", file=sys.stderr))


def _note(encoder: str) -> Path:
    return cache_folder() / FOLDER / "encoders" / f"{encoder}.json"


def _remember(encoder: str, weights: Path, tokenizer: Path) -> None:
    """Note where the encoder lies. A disk that refuses costs no more than the note."""
    note = _note(encoder)
    fresh = note.with_name(f"{encoder}.{os.getpid()}.tmp")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps([str(weights.resolve()), str(tokenizer.resolve())]) + "\n", encoding="utf-8")
        fresh.replace(note)
    except OSError as error:
        print(f"note: where the text encoder is could not be kept ({error})", file=sys.stderr)


def _remembered(encoder: str) -> tuple[Path, Path] | None:
    """(text encoder, tokenizer) of that id, if they are still there."""
    try:
        weights, tokenizer = (Path(path) for path in json.loads(_note(encoder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return (weights, tokenizer) if weights.is_file() and tokenizer.is_file() else None

"""Prompts of the Wan 2.1 family: text -> token ids -> embeddings, and a cache on disk so that the encoder runs once a prompt.

Shapes: L tokens (at most 512), D width of the text encoder.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.wan.text import TextEncoder

MOST_TOKENS = 512  # the end token included; longer prompts are cut
FORMAT = "prompt-1"
_EXTRA = "text prompts need the packages of the extra `wan`: pip install 'worldmodel[wan]'"


def need_packages() -> None:
    """Raise ConfigError where a package that the encoding of prompts needs is missing; imports none of them."""
    if not all(importlib.util.find_spec(name) for name in ("ftfy", "sentencepiece")):
        raise ConfigError(_EXTRA)


def clean_text(text: str) -> str:
    """Text as the public models were trained on it: mended encoding, HTML entities resolved twice, single spaces.

    Raises ConfigError where the package ftfy is missing.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ConfigError(_EXTRA) from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """The published sentencepiece model (``google/umt5-xxl/spiece.model``).

    Names of special tokens that are typed into a prompt are text like any other.
    Raises CheckpointError for a missing or damaged file, ConfigError where the package sentencepiece is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(_EXTRA) from error
        try:
            self._pieces: Any = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"the tokenizer {path} is missing or damaged: download spiece.model again") from error
        if self._pieces.eos_id() < 0:
            raise CheckpointError(f"the tokenizer {path} has no end token: it belongs to another model")

    def __call__(self, text: str) -> list[int]:
        """Ids of the cleaned text, 1 to 512 of them, the end token last. Nothing is padded."""
        return [*self._pieces.encode(clean_text(text))[: MOST_TOKENS - 1], self._pieces.eos_id()]


class PromptEncoder:
    """Texts -> embeddings, (L,D) each, from the published files. `id` names what the result depends on beside the text.

    Making one reads names, shapes and samples; the tokenizer is loaded and the weights are streamed when it is called.
    dtype: of the matrix products and of the result. keep: see `TextEncoder`.
    """

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        keep: bool = False,
    ) -> None:
        self._tokenizer = Path(tokenizer)
        if not self._tokenizer.is_file():
            raise CheckpointError(f"the tokenizer {tokenizer} is missing: download spiece.model again")
        self._encoder = TextEncoder(weights, device, dtype, keep)
        pieces = hashlib.sha256(self._tokenizer.read_bytes()).hexdigest()
        self.id = hashlib.sha256(f"{self._encoder.fingerprint()} {pieces} {dtype}".encode()).hexdigest()[:16]

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (L,D) in the texts' order. The diffusion net pads them with zero rows to 512, and attends to those too."""
        tokenizer = Tokenizer(self._tokenizer)
        return self._encoder.embed([tokenizer(text) for text in texts])


class PromptCache:
    """Embeddings by text, a safetensors file each, for one `encoder` (a `PromptEncoder.id`).

    A damaged file counts as absent, and a full or write-protected disk costs only the time saved: both are told to `say`.
    """

    def __init__(self, folder: Path, encoder: str, say: Callable[[str], None]) -> None:
        self.folder, self._encoder, self._say = Path(folder), encoder, say

    def path(self, text: str) -> Path:
        """File of this text's embedding, existing or not."""
        key = f"{self._encoder}\0{text}".encode(errors="surrogatepass")
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"

    def embeddings(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Sequence[Tensor]]) -> list[Tensor]:
        """Embeddings (L,D) on the CPU in the texts' order. `encode` is called with all that the cache lacks, or not at all."""
        known = {text: kept for text in dict.fromkeys(texts) if (kept := self.get(text)) is not None}
        absent = [text for text in dict.fromkeys(texts) if text not in known]
        for text, embedding in zip(absent, encode(absent) if absent else (), strict=True):
            known[text] = embedding.detach().cpu().contiguous()
            self.put(text, known[text])
        return [known[text] for text in texts]

    def get(self, text: str) -> Tensor | None:
        """The embedding (L,D) as it was put, bit for bit, or None."""
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts, embedding = json.loads((file.metadata() or {})["worldmodel"]), file.get_tensor("embedding")
            if facts == self._facts(text, embedding):
                return embedding
            reason = "its content has changed"
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = str(error)
        self._say(f"the cached prompt {path} is damaged ({reason}): it is made anew")
        return None

    def put(self, text: str, embedding: Tensor) -> None:
        """Keep an embedding (L,D) that lies on the CPU. Written beside its place, then renamed: nobody reads half a file."""
        path = self.path(text)
        fresh = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"embedding": embedding}, fresh, metadata={"worldmodel": json.dumps(self._facts(text, embedding))})
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            self._say(f"the prompt could not be kept in {self.folder} ({error}): the text encoder runs again next time")

    def _facts(self, text: str, embedding: Tensor) -> dict[str, str]:
        digest = hashlib.sha256(embedding.view(torch.uint8).numpy().tobytes()).hexdigest()
        return {"format": FORMAT, "encoder": self._encoder, "text": text, "sha256": digest}

"""Public files -> the folder of a video world: transformer, decoder and prompt embeddings, each converted once.

What a published checkpoint is (its file, which net in it, chunk, steps) stands in worldmodel/cards/NAME.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from worldmodel.action import ActionSpec
from worldmodel.compiled import cache_folder
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig, from_dict
from worldmodel.convert import convert_file, named_config
from worldmodel.errors import ConfigError
from worldmodel.models.wan.codec_keys import tiny_from_reference, vae_from_reference
from worldmodel.models.wan.prompts import PromptCache, PromptEncoder
from worldmodel.models.wan.vae import WanVAE
from worldmodel.prompt_list import FOLDER
from worldmodel.sums import SUMS, sums_of
from worldmodel.tensor_files import TensorFile
from worldmodel.video_session import CAMERA_ACTIONS
from worldmodel.video_world import Prompt, check_prompt, decoder_of, export_video, load_video, video_config, write_prompt

CARDS = Path(__file__).parent / "cards"
FRAMES_PER_LATENT = 4
SHIFT = 5.0
TINY = CodecConfig(kind="taehv", decoder_widths=(256, 128, 64))
FULL = CodecConfig(kind="wan_vae", decoder_widths=(96, 96, 96))


@dataclass(frozen=True)
class VideoCard:
    """A published checkpoint of the family: where it lies on the hub, and how it is played.

    entry: which net of the file ("" = the only one). config: see `worldmodel.convert.named_config`. The rest as in SamplerConfig.
    """

    title: str
    repo: str
    file: str
    entry: str
    config: str
    chunk: int
    steps: int
    first_steps: int
    window: int
    sink: int
    height: int
    width: int
    fps: int


def card_names() -> list[str]:
    return sorted(path.stem for path in CARDS.glob("*.json"))


def read_card(name: str) -> VideoCard:
    """The card of that name, or of a JSON file. Raises ConfigError."""
    path = CARDS / f"{name}.json" if name in card_names() else Path(name)
    if not path.is_file():
        raise ConfigError(f"no published world is called {name!r}: give one of {', '.join(card_names())}, or the file of a card")
    try:
        return from_dict(VideoCard, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): correct it") from error


def world_config(name: str, card: VideoCard, model: DiTConfig, codec: CodecConfig) -> WorldConfig:
    """config.json of a published world."""
    return WorldConfig(
        name=name,
        title=card.title,
        height=card.height,
        width=card.width,
        fps=card.fps,
        family="wan",
        frames_per_latent=FRAMES_PER_LATENT,
        model=model,
        codec=codec,
        sampler=SamplerConfig(
            kind="consistency",
            shift=SHIFT,
            presets=tuple(sorted({1, 2, 4, card.steps})),
            steps=card.steps,
            window=card.window,
            sink=card.sink,
            chunk=card.chunk,
            first_steps=card.first_steps,
        ),
        actions=CAMERA_ACTIONS if model.camera else ActionSpec(),
        provenance={"repo": card.repo, "file": card.file, "entry": card.entry},
    )


def read_codec(path: Path, codec: CodecConfig | None = None) -> tuple[CodecConfig, dict[str, Tensor]]:
    """Published decoder weights -> (its config, state dict in bf16). codec: its shape where it is not the published one.

    Which of the two decoders a file holds is told by its names. Raises CheckpointError.
    """
    with TensorFile(path) as file:
        state = {name: file.read(name) for name in file.facts}
    full = any(name.startswith(("decoder.upsamples", "conv2.")) for name in state)
    codec = codec or (FULL if full else TINY)
    if full:
        whole = vae_from_reference(state, WanVAE(codec.decoder_widths[0]).state_dict())
        values = {name.removeprefix("decoder."): value for name, value in whole.items() if name.startswith("decoder.")}
    else:
        values = tiny_from_reference(state, decoder_of(codec).state_dict())
    return codec, {name: value.bfloat16() for name, value in values.items()}


def embed(texts: Sequence[str], encoder: Path, tokenizer: Path, say: Callable[[str], None]) -> list[Prompt]:
    """Prompts with their embeddings, from the cache or the text encoder. Raises CheckpointError, ConfigError."""
    prompts = PromptEncoder(encoder, tokenizer)
    cache = PromptCache(cache_folder() / FOLDER, prompts.id, say)
    return [Prompt(text, vectors) for text, vectors in zip(texts, cache.embeddings(texts, prompts), strict=True)]


def check_places(weights: Path, codec_file: Path, out: Path) -> None:
    """Raise a WorldModelError if a file to read holds no tensors, or if `out` cannot become a world folder. Reads headers only."""
    for path in (weights, codec_file):
        with TensorFile(path):
            pass
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and is no world folder: name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be made ({error.strerror or error}): name another folder") from error


def assemble(
    name: str,
    weights: Path,
    out: Path,
    codec_file: Path,
    prompts: Sequence[Prompt],
    card: VideoCard | None = None,
    codec: CodecConfig | None = None,
    model: DiTConfig | None = None,
) -> None:
    """Write the world folder `out` of the published world `name`, whole or not at all. Raises WorldModelErrors.

    card, codec, model: where they are not the published ones of that name.
    """
    card = card or read_card(name)
    model = model or named_config(card.config)
    codec, state = read_codec(codec_file, codec)
    config = world_config(name, card, model, codec)
    out.parent.mkdir(parents=True, exist_ok=True)
    converted = out.with_name(f".{out.name}.model.safetensors")
    try:
        convert_file(weights, converted, model, card.entry or None)
        export_video(out, config, converted, state, prompts, _readme(config, card))
    finally:
        converted.unlink(missing_ok=True)


def check_world(folder: Path) -> None:
    """Raise ConfigError if prompts cannot be added to `folder`: no video world, or write-protected. Reads its description only."""
    video_config(folder)
    if not os.access(folder / FOLDER, os.W_OK):
        raise ConfigError(f"nothing can be written to {folder / FOLDER}: change its rights, or convert the world to another folder")


def add_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Put more prompts into a video world's folder; its hashes follow. Raises WorldModelErrors."""
    world = load_video(folder)
    for prompt in prompts:
        check_prompt(prompt, world.config)
    for number, prompt in enumerate(prompts, len(world.prompts)):
        write_prompt(folder, number, prompt)
    (folder / SUMS).write_text(sums_of(folder), encoding="utf-8")


def _readme(config: WorldConfig, card: VideoCard) -> str:
    steps = f"{config.sampler.steps} denoising steps" + (f", {card.first_steps} for the first" if card.first_steps else "")
    return f"""# {config.title}

Converted from `{card.file}` of `{card.repo}`; its licence and terms are those of that repository.

- {config.width}x{config.height} pixels at {config.fps:g} frames a second, {card.chunk} latent{"s" if card.chunk > 1 else ""} of
  {FRAMES_PER_LATENT} pictures at a time, {steps}
- {"keys and mouse move the camera" if config.model.camera else "the prompt alone says what happens"}
"""

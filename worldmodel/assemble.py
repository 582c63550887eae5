"""Public files -> the folder of a video world: transformer, decoder and prompt embeddings, each converted once.

What a published checkpoint is (its file, which net in it, chunk, steps) stands in worldmodel/cards/NAME.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from worldmodel.action import ActionSpec
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig
from worldmodel.convert import convert_file, named_config
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.wan.codec_keys import tiny_from_reference, vae_from_reference
from worldmodel.models.wan.tiny_decoder import WIDTHS
from worldmodel.models.wan.vae import WIDTH, WanVAE
from worldmodel.prompt_book import embed
from worldmodel.prompt_list import FOLDER, entries
from worldmodel.published import VideoCard
from worldmodel.sums import SUMS, sha256
from worldmodel.tensor_files import TensorFile
from worldmodel.video_session import CAMERA_ACTIONS
from worldmodel.video_world import Prompt, check_prompt, decoder_of, export_video, video_config, write_prompt

FRAMES_PER_LATENT = 4
SHIFT = 5.0


def world_config(
    name: str, card: VideoCard, model: DiTConfig, codec: CodecConfig, origin: Mapping[str, str] | None = None
) -> WorldConfig:
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
            presets=(card.steps,) if card.rolling else tuple(sorted({1, 2, 4, card.steps})),
            steps=card.steps,
            window=card.window,
            sink=card.sink,
            chunk=card.chunk,
            first_steps=card.first_steps,
            rolling=card.rolling,
        ),
        actions=CAMERA_ACTIONS if model.camera else ActionSpec(),
        memory_mb={"bfloat16": card.memory_mb} if card.memory_mb else {},
        provenance={"repo": card.model.repo, "file": card.model.file, "entry": card.entry, **(origin or {})},
    )


def expected_world(name: str, card: VideoCard) -> WorldConfig:
    """`world_config` before the files are here: with the decoder that its file's name promises."""
    vae = "vae" in Path(card.decoder.file).name.lower()
    codec = CodecConfig("wan_vae", decoder_widths=(WIDTH,) * 3) if vae else CodecConfig("taehv", decoder_widths=WIDTHS[:3])
    return world_config(name, card, named_config(card.config), codec)


def read_decoder(path: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    """Published decoder weights -> (its config, state dict in bf16). Raises CheckpointError.

    Which of the two decoders a file holds is told by its names, how wide it is by its shapes.
    """
    state = _read(path)
    if _is_vae(state):
        codec = CodecConfig(kind="wan_vae", decoder_widths=(_vae_width(state),) * 3)
        whole = vae_from_reference(state, WanVAE(codec.decoder_widths[0]).state_dict())
        values = {name.removeprefix("decoder."): value for name, value in whole.items() if name.startswith("decoder.")}
    else:
        first, second, third = (len(state.get(f"decoder.{i}.weight", ())) for i in (1, 8, 14))
        if not first * second * third:
            raise CheckpointError(f"{path} is neither Wan2.1_VAE nor taew2_1: give one of them")
        codec = CodecConfig(kind="taehv", decoder_widths=(first, second, third))
        values = tiny_from_reference(state, decoder_of(codec).state_dict())
    return codec, {name: value.bfloat16() for name, value in values.items()}


def read_encoder(path: Path) -> dict[str, Tensor]:
    """The encoder of the family's own VAE, float32, for worlds that begin with a picture. Raises CheckpointError."""
    state = _read(path)
    if not _is_vae(state):
        raise CheckpointError(f"{path} is not Wan2.1_VAE, whose encoder a start picture needs: give that file")
    whole = vae_from_reference(state, WanVAE(_vae_width(state)).state_dict())
    return {name.removeprefix("encoder."): value for name, value in whole.items() if name.startswith("encoder.")}


def _read(path: Path) -> dict[str, Tensor]:
    with TensorFile(path) as file:
        state = {name: file.read(name) for name in file.facts}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} is damaged: {name} holds values that are not finite; take the original weights")
    return state


def _is_vae(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("decoder.upsamples", "conv2.")) for name in state)


def _vae_width(state: Mapping[str, Tensor]) -> int:
    return max(1, len(state.get("encoder.conv1.bias", ())))


def embedded(texts: Sequence[str], encoder: Path, tokenizer: Path, device: str = "cpu") -> list[Prompt]:
    """Prompts with their embeddings, from the cache or the text encoder, which runs on `device`.

    Raises CheckpointError, ConfigError.
    """
    vectors, made_by = embed(texts, encoder, tokenizer, device)
    return [Prompt(text, vector, made_by) for text, vector in zip(texts, vectors, strict=True)]


def check_places(files: Sequence[Path], out: Path) -> None:
    """Raise a WorldModelError if a file to read holds no tensors, or if `out` cannot become a world folder. Reads headers only."""
    for path in files:
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
    card: VideoCard,
    weights: Path,
    codec: Path,
    prompts: Sequence[Prompt],
    out: Path,
    encoder: Path | None = None,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write the world folder `out` of a published world, whole or not at all. Raises WorldModelErrors.

    weights, codec, encoder: the published files; without an encoder the world cannot begin with a picture. origin: for provenance.
    """
    model = named_config(card.config)
    codec_config, state = read_decoder(codec)
    encoder_state = None if encoder is None else read_encoder(encoder)
    config = world_config(name, card, model, codec_config, origin or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    converted = out.with_name(f".{out.name}.model.safetensors")
    try:
        convert_file(weights, converted, model, card.entry or None)
        export_video(out, config, converted, state, prompts, _readme(config, card), encoder_state)
    finally:
        converted.unlink(missing_ok=True)


def check_world(folder: Path) -> None:
    """Raise ConfigError if prompts cannot be added to `folder`: no video world, or write-protected. Reads its description only."""
    video_config(folder)
    if not os.access(folder / FOLDER, os.W_OK):
        raise ConfigError(f"nothing can be written to {folder / FOLDER}: change its rights, or convert the world to another folder")


def add_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Put more prompts into a video world's folder; its hashes follow. Raises WorldModelErrors."""
    config = video_config(folder)
    for prompt in prompts:
        check_prompt(prompt, config)
    for number, prompt in enumerate(prompts, len(entries(folder))):
        write_prompt(folder, number, prompt)
    kept = [line for line in (folder / SUMS).read_text(encoding="utf-8").splitlines() if f"  {FOLDER}/" not in line]
    files = [path for entry in entries(folder) for path in (entry.file, entry.file.with_suffix(".json"))]
    lines = sorted([*kept, *(f"{sha256(p)}  {p.relative_to(folder).as_posix()}" for p in files)], key=lambda x: x.split("  ")[1])
    fresh = folder / f".{SUMS}.tmp"
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fresh.replace(folder / SUMS)


def _readme(config: WorldConfig, card: VideoCard) -> str:
    steps = f"{config.sampler.steps} denoising steps" + (f", {card.first_steps} for the first" if card.first_steps else "")
    steps += f", {config.sampler.steps} chunks dreamed together" if card.rolling else ""
    return f"""# {config.title}

Converted from `{card.model.file}` of `{card.model.repo}`; its licence and terms are those of that repository.

- {config.width}x{config.height} pixels at {config.fps:g} frames a second, {card.chunk} latent{"s" if card.chunk > 1 else ""} of
  {FRAMES_PER_LATENT} pictures at a time, {steps}
- {"keys and mouse move the camera" if config.model.camera else "the prompt alone says what happens"}
"""

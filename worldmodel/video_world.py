"""Folders of video worlds (the Wan 2.1 family) <-> live objects: as other world folders, but with prompts for starting places.

config.json, model.safetensors, codec.safetensors (the decoder), prompts/NNN.safetensors (an embedding, its text beside it),
README.md and SHA256SUMS; encoder.safetensors where a picture can be the start. Weights stay mapped in their own type until they
are placed on a device. Shapes: L tokens, D text width, H W picture, C h w latent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel import prompt_list, runtime
from worldmodel.checkpoint import check_state, read_tensors, written_whole
from worldmodel.config import CodecConfig, WorldConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.footprint import machine, sizes_of
from worldmodel.models.codec import to_float
from worldmodel.models.dit import DiT
from worldmodel.models.video import StreamNet, VideoEncoder
from worldmodel.models.wan.tiny_decoder import TinyDecoder
from worldmodel.models.wan.vae import WanDecoder, WanEncoder
from worldmodel.placement import Placement, place, text_alone
from worldmodel.prompt_book import PromptBook, encoder_sizes
from worldmodel.sums import verify as verify_sums
from worldmodel.sums import weights_id
from worldmodel.tensor_files import Facts, write_tensors
from worldmodel.video_session import VideoSession

ENCODER = "encoder.safetensors"


@dataclass(frozen=True)
class Prompt:
    """A starting place: its text, and what the text encoder made of it, (L,D). encoder: the text encoder's id, "" if unknown."""

    text: str
    embedding: Tensor
    encoder: str = ""


@dataclass(frozen=True)
class LoadedVideo:
    """What the folder of a video world holds, checked but not yet placed. weights_hash: short id of model and decoder weights."""

    config: WorldConfig
    model: DiT
    decoder: StreamNet
    prompts: tuple[Prompt, ...]
    weights_hash: str


def decoder_of(codec: CodecConfig) -> StreamNet:
    """The decoder of a video codec, untrained."""
    if codec.kind == "taehv":
        first, second, third = codec.decoder_widths
        return TinyDecoder((first, second, third, third))
    if codec.kind == "wan_vae":
        return WanDecoder(codec.decoder_widths[0])
    raise ConfigError(f"a video world's codec.kind is wan_vae or taehv, got {codec.kind!r}")


def _assigned(module: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Put mapped tensors in the place of shapes."""
    check_state(module.state_dict(), state, file)
    module.load_state_dict(state, assign=True)


def video_config(folder: Path) -> WorldConfig:
    """The description of a video world. Raises ConfigError if the folder holds none."""
    config = WorldConfig.load(folder)
    if config.family != "wan":
        raise ConfigError(f"{folder} is a world of the family {config.family!r}, not a video world")
    return config


def load_video(folder: Path, verify: bool = True) -> LoadedVideo:
    """Read and check a video world. Raises ConfigError or CheckpointError: missing, damaged, cut off, wrong version or shapes."""
    folder = Path(folder)
    config = video_config(folder)
    hashes = verify_sums(folder) if verify else {}
    with torch.device("meta"):
        model, decoder = DiT(config.model), decoder_of(config.codec)
    _assigned(model, read_tensors(folder / "model.safetensors"), "model.safetensors")
    _assigned(decoder, read_tensors(folder / "codec.safetensors"), "codec.safetensors")
    prompts = tuple(_read_prompt(entry, config) for entry in prompt_list.entries(folder))
    if not prompts:
        raise CheckpointError(f"{folder} has no prompts/NNN.safetensors: there is no place to start, convert the world again")
    return LoadedVideo(config, model, decoder, prompts, weights_id(folder, hashes))


def open_video(
    folder: Path,
    device: str = "auto",
    steps: int | None = None,
    threads: int | str = "auto",
    dtype: torch.dtype | None = None,
    image: np.ndarray | None = None,
    merge: bool = False,
    window: int | None = None,
    decoder: str = "auto",
) -> VideoSession:
    """Load a video world and place its parts by what they take and what is free (`worldmodel.placement`).

    steps: denoising steps a chunk (None: the world's own). threads: CPU threads; ``auto`` is all cores, ``spare`` all but one.
    image: uint8 (H,W,3), the first picture of every start. merge: throughput mode, see `Dream`. window: latents that attention
    sees, at most the world's own. decoder: beside a GPU ``gpu`` or ``cpu``, ``auto``: by the free memory. Raises WorldModelErrors,
    before it loads where it does not fit.
    """
    at, reason = runtime.pick_device(device)
    config = remembering(video_config(folder), window)
    made_by = next((entry.encoder for entry in prompt_list.entries(folder)), "")
    net = None if image is None else _encoder_shapes(Path(folder) / ENCODER)
    plan = placed_on(at, config, net, encoder_sizes(made_by), decoder, dtype)
    loaded = load_video(folder)
    if isinstance(threads, str) and "cpu" in (at.type, plan.decoder):
        threads = max(1, runtime.available_threads() - (threads == "spare"))
    runtime.host_threads(threads)
    prompts = [p.embedding for p in loaded.prompts]
    start = None if image is None else encode_picture(folder, config, image, torch.device(plan.encoder))
    if plan.encoder == "cuda":
        torch.cuda.empty_cache()  # the encoder is gone, the network may have its memory
    decode_on = torch.device(plan.decoder), getattr(torch, plan.decoder_dtype)
    session = VideoSession(
        config,
        loaded.model,
        loaded.decoder,
        prompts,
        at,
        getattr(torch, plan.dtype),
        steps,
        loaded.weights_hash,
        start,
        decode_on,
    )
    session.device_note, session.placement, session.merge = reason, plan.lines, merge
    session.book = PromptBook({p.text: p.embedding for p in loaded.prompts}, loaded.prompts[0].encoder, plan.text, plan.keep_text)
    return session


def remembering(config: WorldConfig, window: int | None) -> WorldConfig:
    """The world with a shorter cache, of `window` latents (None: as it is). Raises ConfigError."""
    sampler = config.sampler
    if window is None:
        return config
    if not sampler.least_window <= window <= sampler.window:
        raise ConfigError(f"{config.name!r} sees {sampler.least_window} to {sampler.window} latents, got a window of {window}")
    return replace(config, sampler=replace(sampler, window=window))


def placed_on(
    device: torch.device,
    config: WorldConfig,
    encoder: StreamNet | None = None,
    text: tuple[int, int] = (0, 0),
    decoder: str = "auto",
    dtype: torch.dtype | None = None,
) -> Placement:
    """Where the parts of the world that `config` describes live on this machine, its network on `device`.

    encoder, text: see `sizes_of`. decoder: see `open_video`. Raises DeviceError where the world does not fit.
    """
    with torch.device("meta"):
        net = decoder_of(config.codec)
    kind = "" if dtype is None else str(dtype).removeprefix("torch.")
    return place(config.name, sizes_of(config, net, encoder, text), machine(device), decoder, kind)


def text_device(device: str, layer: int) -> str:
    """Where prompts are encoded before a world is loaded: on `device` if it has the room. layer: see `sizes_of`, of the encoder."""
    return text_alone(machine(runtime.pick_device(device)[0]), layer)


def check_chunk(name: str, chunk: int) -> None:
    """Raise ConfigError for a world that cannot begin with a picture, because it dreams several latents at once."""
    if chunk > 1:
        raise ConfigError(
            f"{name!r} dreams {chunk} latents at once and a picture is one: leave out --image, "
            "or take a frame-wise world such as wan-causal-forcing-2step"
        )


@torch.inference_mode()
def encode_picture(folder: Path, config: WorldConfig, image: np.ndarray, device: torch.device) -> Tensor:
    """A picture, uint8 (H,W,3), as the first latent of a clip, (1,1,C,h,w). The encoder is let go afterwards.

    Raises ConfigError for a world that cannot begin with a picture, CheckpointError for a damaged encoder.
    """
    check_chunk(config.name, config.sampler.chunk)
    path = Path(folder) / ENCODER
    if not path.is_file():
        raise ConfigError(f"{config.name!r} has no {ENCODER}, so it takes no --image: make it again with --encoder Wan2.1_VAE.pth")
    if image.shape != (config.height, config.width, 3) or image.dtype != np.uint8:
        raise ConfigError(f"{config.name!r} begins with a uint8 picture of {config.width}x{config.height}, got {image.shape}")
    net = _encoder_shapes(path)
    if net is None:
        raise CheckpointError(f"{path} is damaged: make the world again")
    _assigned(net, read_tensors(path), ENCODER)
    rgb = to_float(image[None]).to(device)[None]
    return VideoEncoder(net.to(device, torch.float32).eval()).encode(rgb)


def _encoder_shapes(path: Path) -> WanEncoder | None:
    """The encoder of a file, without its numbers; None where there is none, or a damaged one."""
    width = len(read_tensors(path).get("layers.0.bias", ())) if path.is_file() else 0
    with torch.device("meta"):
        return WanEncoder(width) if width else None


def _read_prompt(entry: prompt_list.Entry, config: WorldConfig) -> Prompt:
    embedding = read_tensors(entry.file).get("embedding")
    if embedding is None:
        raise CheckpointError(f"{entry.file} holds no prompt embedding: make it again")
    prompt = Prompt(entry.text, embedding, entry.encoder)
    check_prompt(prompt, config)
    return prompt


def check_prompt(prompt: Prompt, config: WorldConfig) -> None:
    """Raise CheckpointError unless the embedding is one that this world's model can take."""
    most, width, shape = config.model.text_len, config.model.text_dim, tuple(prompt.embedding.shape)
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= most:
        raise CheckpointError(
            f"the embedding of {prompt.text[:40]!r} has the shape {shape}, {config.name!r} takes (1 to {most}, {width}): "
            "make it with the text encoder of this family"
        )
    if not torch.isfinite(prompt.embedding).all():
        raise CheckpointError(f"the embedding of {prompt.text[:40]!r} holds values that are not finite: make it again")


def write_prompt(folder: Path, number: int, prompt: Prompt) -> None:
    """Write ``prompts/NNN`` of a world's folder: the text comes last and whole, and without it the embedding does not count."""
    path = folder / prompt_list.FOLDER / f"{number:03d}.safetensors"
    embedding = prompt.embedding.detach().cpu().contiguous()
    write_tensors(path, {"embedding": Facts(embedding.dtype, tuple(embedding.shape))}, iter([("embedding", embedding)]), {})
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({"text": prompt.text, "encoder": prompt.encoder}) + "\n", encoding="utf-8")
    fresh.replace(path.with_suffix(".json"))


def export_video(
    folder: Path,
    config: WorldConfig,
    model: Path,
    codec_state: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    card: str,
    encoder_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a video world, whole or not at all. model: a .safetensors file in our layout, which is moved into the folder.

    encoder_state: of a `WanEncoder`, for worlds that can begin with a picture.

    Raises CheckpointError if there is no prompt or the disk refuses.
    """
    if not prompts:
        raise CheckpointError("a video world needs at least one prompt embedding")
    for prompt in prompts:
        check_prompt(prompt, config)
    with written_whole(folder) as fresh:
        (fresh / prompt_list.FOLDER).mkdir()
        (fresh / "config.json").write_text(config.to_json(), encoding="utf-8")
        (fresh / "README.md").write_text(card, encoding="utf-8")
        shutil.move(model, fresh / "model.safetensors")
        _write_state(fresh / "codec.safetensors", codec_state)
        if encoder_state is not None:
            _write_state(fresh / ENCODER, encoder_state)
        for number, prompt in enumerate(prompts):
            write_prompt(fresh, number, prompt)


def _write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_tensors(path, {n: Facts(t.dtype, tuple(t.shape)) for n, t in values.items()}, iter(values.items()), {})

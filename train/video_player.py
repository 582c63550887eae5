"""A network that dreams videos, ready to be examined: of a video world's folder, or of a run on videos, which exports no world.

Shapes: B clips, T latents, C h w latent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import RunConfig
from train.data import file_digest
from train.distributed import Ranks
from train.made_once import Report
from train.record import read_json
from train.stages.base import Context
from train.student import Student
from train.video_codec import VideoCodec
from train.videos import VideoLatents
from train.weights import load_network
from worldmodel.config import EXPORT, DiTConfig, SamplerConfig
from worldmodel.errors import ConfigError
from worldmodel.models.dit import DiT
from worldmodel.plain import from_dict
from worldmodel.video_world import load_video

MODEL = "model.json"


@dataclass(frozen=True)
class Player:
    """name, weights_hash: whose weights these are. codec: what shows the latents, None where nothing does."""

    name: str
    weights_hash: str
    model: DiT
    sampler: SamplerConfig
    codec: VideoCodec | None
    data: VideoLatents
    context: Context

    def student(self) -> Student:
        """One rollout at a time: the cache of a large network takes gigabytes."""
        return Student(self.model, self.context, self.data.shape, self.sampler, 1, graphs=False, pictured=self.data.shape[0])


def open_player(config: RunConfig, out: Path, device: torch.device, report: Report) -> Player:
    """The network at ``world=`` beside the videos at ``data.root=``. Raises WorldModelErrors."""
    folder = dreams_videos(config.world)
    if folder is None:
        raise ConfigError(
            f"world={config.world} holds no network for videos: give the folder of a video world, or of a run on prepared videos"
        )
    decoder = None
    if (folder / MODEL).is_file():
        network, sampler = _of_a_run(folder)
        with torch.device("meta"):
            model = DiT(network)
        model = model.to_empty(device=device)
        load_network(str(folder), model, key="world")
        name, digest = folder.resolve().parent.name, file_digest(folder / "model.safetensors")
    else:
        world = load_video(folder)
        network, sampler, model, decoder = world.config.model, world.config.sampler, world.model, world.decoder
        name, digest = world.config.name, world.weights_hash
        if sampler.rolling:
            raise ConfigError(f"world={config.world} dreams several chunks at once, which rollouts of training do not: play it")
    taken = {field.name: getattr(network, field.name) for field in dataclasses.fields(config.model.dit)}
    options = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, **taken))
    context = Context(dataclasses.replace(config, model=options), Ranks(0, 1, device), out, report)
    data = VideoLatents(context, Path(config.data.root))
    if network.in_channels != data.shape[0] or any(side % network.patch for side in data.shape[1:]):
        raise ConfigError(
            f"world={config.world} does not take the latents {data.shape} of {data.folder}: give videos prepared for it"
        )
    shown_by = data.shown_by or (None if decoder is None else VideoCodec(decoder.to(device).eval()))
    return Player(name, digest, model.to(device, context.dtype).eval(), sampler, shown_by, data, context)


def dreams_videos(world: str) -> Path | None:
    """The folder with a network for videos that ``world=`` names; None if it names another world, or nothing."""
    for folder in (Path(world), Path(world) / EXPORT):
        network, own = (read_json(folder / name) or {} for name in (MODEL, "config.json"))
        if own.get("family") == "wan" or (isinstance(network.get("model"), dict) and network["model"].get("text_dim")):
            return folder
    return None


def _of_a_run(folder: Path) -> tuple[DiTConfig, SamplerConfig]:
    described = read_json(folder / MODEL) or {}
    if "sampler" not in described:
        raise ConfigError(
            f"{folder} holds a network that makes no rollouts (a teacher, or an export of an older version): give a run of "
            "stage=ar_diffusion or a student of one"
        )
    return from_dict(DiTConfig, described.get("model"), "model"), from_dict(SamplerConfig, described["sampler"], "sampler")

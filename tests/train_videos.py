"""Tiny prepared videos with prompts and cameras, and networks trained on them, in the shape of the published video models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.test_wan_codec import published_tiny, published_vae, tensors
from tests.train_boxes import TINY, composed, latest
from train.distributed import Ranks
from train.jobs import run
from train.prepare import Plan, prepare
from train.stages import Context, build
from train.stages.flow import FlowMatching
from train.state import TrainState
from train.video_codec import load_encoder
from worldmodel.assemble import assemble
from worldmodel.cli import main as checkpoint
from worldmodel.config import DiTConfig
from worldmodel.data.video import VideoWriter
from worldmodel.models.dit import DiT
from worldmodel.published import read_card
from worldmodel.video_world import Prompt

CPU = torch.device("cpu")
SIZE, FRAMES = (32, 48), 9  # 3 latents of 4x6
DIT = {"dim": 48, "layers": 2, "heads": 2, "ffn_dim": 96, "freq_dim": 32, "text_dim": 16, "text_len": 12}
SHAPE = (*(f"model.dit.{name}={value}" for name, value in DIT.items()), "model.sampler.window=4")
FLOW = ("stage.ema_every=1", "stage.batch=2", "stage.clip_frames=3", "stage.lr=1e-3", "stage.optimizer=adamw", "train.log_steps=1")
STAGES: dict[str, tuple[str, ...]] = {
    "teacher": (),
    "ar_diffusion": (),
    "causal_cd": ("init={}/ar", "stage.guidance=3"),
    "causal_ode": ("init={}/ar", "stage.pairs=2", "stage.levels=4", "stage.guidance=3"),
    "tcm": ("init={}/ar", "teacher={}/ar"),
    "apex": ("init={}/ar",),
    "dmd": ("init={}/ar", "teacher={}/teacher", "stage.guidance=4"),
    "self_forcing": ("init={}/ar", "teacher={}/teacher", "stage.pairs=2", "stage.levels=4", "stage.pretrain_steps=1"),
    "causvid": ("init={}/ar", "teacher={}/teacher", "stage.pairs=2", "stage.levels=4", "stage.pretrain_steps=1"),
    "anyflow": ("init={}/ar", "teacher={}/teacher", "stage.pretrain_steps=1", "stage.map_guidance=2"),
}
ROLLOUTS = ("stage.context_frames=0", "stage.rollout_frames=3")


def write_video(path: Path, pictures: int, fps: float = 16.0, shade: int = 40) -> Path:
    """Grey pictures that grow lighter, with a moving bar."""
    with VideoWriter(path, SIZE, fps) as video:
        for i in range(pictures):
            rgb = np.full((*SIZE, 3), min(shade + 3 * i, 255), np.uint8)
            rgb[:, 2 * i % 40 : 2 * i % 40 + 8] = (220, 60, 60)
            video.write(rgb)
    return path


def manifest(folder: Path, *lines: dict[str, object]) -> None:
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def plan(**changes: object) -> Plan:
    names = {"codec": "x", "text": "x", "negative": "x"}
    return Plan(**{**names, "height": 32, "width": 48, "fps": 16.0, "frames": 9, "shard": 1, **changes})  # type: ignore[arg-type]


def letters(texts) -> list[torch.Tensor]:
    return [torch.full((1 + len(text), 16), float(len(text))).bfloat16() for text in texts]


def noise_latents(clip) -> Tensor:
    """Stands in for a codec: noise that belongs to the clip."""
    return torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(ord(clip.video.told["file"][0])))


def words(home: Path, stage: str, *more: str, camera: bool = True) -> tuple[str, ...]:
    rollouts = ROLLOUTS if stage in ("dmd", "self_forcing", "causvid", "anyflow") else ()
    data = ("data=video", f"data.root={home}/data", f"model.dit.camera={str(camera).lower()}")
    own = [word.format(home) for word in STAGES[stage]]
    return ("model=wan_1_3b", *SHAPE, *data, f"stage={stage}", *TINY, *FLOW, *rollouts, *own, *more)


def trained(home: Path, name: str, stage: str, *more: str, camera: bool = True) -> TrainState:
    run(composed(*words(home, stage, *more, camera=camera)), home / name)
    return latest(home / name)


def make_home(folder: Path, codec: str = "x") -> Path:
    """Prepared videos with prompts and cameras, public weights without a camera, and a teacher and a causal network from them.

    codec: id of what made the latents.
    """
    torch.set_num_threads(1)
    videos = folder / "videos"
    videos.mkdir()
    lines = []
    for i in range(5):
        write_video(videos / f"{i}.mp4", 9, shade=30 * i)
        lines.append({"file": f"{i}.mp4", "prompt": "x" * (i + 1), "trajectory": f"{'wsadl'[i]}*2"})
    manifest(videos, *lines)  # type: ignore[arg-type]
    prepare(videos, folder / "data", plan(shard=2, codec=codec), noise_latents, letters, print, lambda done, total: None)
    torch.manual_seed(0)
    base = DiT(DiTConfig(**DIT, activation="gelu_tanh"))  # type: ignore[arg-type]
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base/model.safetensors")
    trained(folder, "teacher", "teacher", f"init={folder}/base", "steps=2")
    trained(folder, "ar", "ar_diffusion", f"init={folder}/teacher", "steps=2")
    return folder


def make_coded(folder: Path) -> Path:
    """As `make_home`, with latents of a VAE whose file is vae.safetensors; tiny.safetensors decodes them, too."""
    save_file({name: 0.1 * t for name, t in tensors(published_vae(4)).items()}, folder / "vae.safetensors")
    save_file({name: 0.1 * t for name, t in tensors(published_tiny((16, 8, 8, 8))).items()}, folder / "tiny.safetensors")
    return make_home(folder, load_encoder(folder / "vae.safetensors", CPU)[1])


def own(coded: Path, codec: str = "vae") -> tuple[str, ...]:
    """Overrides that name a codec of `make_coded`."""
    return (f"codec={coded}/{codec}.safetensors",)


def built(home: Path, stage: str, *more: str) -> FlowMatching:
    ready = build(Context(composed(*words(home, stage, *more)), Ranks(0, 1, CPU), home / "built", print))
    assert isinstance(ready, FlowMatching)
    return ready


def student_world(home: Path, folder: Path, export: Path) -> Path:
    """export -> the reference's names -> the folder of a world by a card of one's own."""
    public = folder / "public.safetensors"
    assert (
        checkpoint(["convert", str(export / "model.safetensors"), str(public), "--config", str(export), "--to", "reference"]) == 0
    )
    size = {"height": 32, "width": 48, "chunk": 1, "window": 4, "steps": 2, "memory_mb": 0}
    card = replace(read_card("minwm-action2v"), config=str(export), **size)
    decoder = {name: 0.1 * t for name, t in tensors(published_tiny((16, 8, 8, 8))).items()}
    save_file(decoder, folder / "taew.safetensors")
    prompt = Prompt("xx", letters(["xx"])[0])
    assemble("student", card, public, folder / "taew.safetensors", [prompt], folder / "world")
    return folder / "world"

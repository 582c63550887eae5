"""A trained autoregressive run -> a world folder that `play.py --world` opens."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import RunConfig
from train.sources import places
from train.stages.base import Progress
from train.unpack import Frames
from worldmodel.checkpoint import LoadedWorld, Spawn, export_world, load_world
from worldmodel.config import WorldConfig
from worldmodel.errors import ConfigError
from worldmodel.runtime import describe_machine

if TYPE_CHECKING:
    from train.stages.flow import FlowMatching

SPAWNS = 8
CANDIDATES = 96


def plain(value: Any) -> Any:
    """A dataclass of settings as JSON values (enums by name)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """Mean colours of an 8x5 grid of the picture (H,W,3), float (5,8,3)."""
    height, width = frame.shape[0] // 5 * 5, frame.shape[1] // 8 * 8
    return frame[:height, :width].reshape(5, height // 5, 8, width // 8, 3).mean(axis=(1, 3), dtype=np.float64)


def pick_spawns(data: Frames, window: int, count: int = SPAWNS) -> list[Spawn]:
    """Up to `count` starts from training episodes: evenly spread candidates, then the ones whose pictures differ most.

    Every spawn holds the `window` real frames before play starts (fewer if the episodes are shorter). Same data, same spawns.
    """
    starts, lengths = data.part(held_out=False)
    length = int(min(window, lengths.max()))
    usable = [(int(s), int(n)) for s, n in zip(starts, lengths, strict=True) if n >= length]
    ends = np.concatenate([np.arange(s + length, s + n + 1) for s, n in usable])
    ends = np.unique(ends[np.linspace(0, len(ends) - 1, min(CANDIDATES, len(ends))).astype(int)])
    looks = np.stack([_thumbnail(np.asarray(data.frames[e - 1])) for e in ends])
    looks = looks.reshape(len(ends), -1)
    chosen = [int(looks.std(axis=1).argmax())]  # the richest view first: it is the face of the world
    while len(chosen) < min(count, len(ends)):
        distance = np.min([np.abs(looks - looks[c]).mean(axis=1) for c in chosen], axis=0)
        chosen.append(int((distance + 0.5 * looks.std(axis=1)).argmax() if distance.max() > 0 else chosen[-1]))
        if chosen[-1] in chosen[:-1]:
            chosen.pop()
            break
    return [Spawn(np.array(data.frames[e - length : e]), np.array(data.actions[e - length : e])) for e in ends[chosen]]


def provenance(config: RunConfig, data: Frames, progress: Progress, codec: dict[str, Any]) -> dict[str, Any]:
    """Where the weights come from: settings, seed, data, work done, machine."""
    return {
        "stage": config.stage.kind,
        "seed": config.seed,
        "steps": progress.step,
        "frame_targets": progress.targets,
        "minutes": round(progress.seconds / 60, 2),
        "data": {"digest": data.digest, "frames": int(data.lengths.sum()), "episodes": len(data.lengths), "world": data.world}
        | places(config),
        "codec": codec,
        "machine": describe_machine(),
        "settings": {"stage": plain(config.stage), "model": plain(config.model)},
    }


def load_exported(folder: Path) -> LoadedWorld:
    """A world that a run exported, with the record of its training. Raises WorldModelErrors."""
    world = load_world(folder)
    if "data" not in world.config.provenance:
        raise ConfigError(f"{folder} was not exported by a training run: give runs/NAME/export")
    return world


def card(config: WorldConfig) -> str:
    """README.md of a world folder."""
    p, data = config.provenance, config.provenance["data"]
    controls = "\n".join(f"- {b.label or b.name}: {', '.join(b.keys) or 'no default key'}" for b in config.actions.buttons)
    axes = "\n".join(f"- {a.name}: {a.source.replace('_', ' ')}, up to {a.limit:g} {a.unit} a frame" for a in config.actions.axes)
    quality = p["codec"].get("held_out_psnr")
    return f"""# {config.title or config.name}

A playable learned world: every frame is painted by a causal diffusion transformer from the frames before it and your action.

- {config.width}x{config.height} pixels at {config.fps:g} frames a second, {config.sampler.steps} denoising steps by default
- trained ({p["stage"]}) on {data["frames"]} frames of "{data["world"]}": {p["steps"]} steps, {p["frame_targets"]} frame targets
- codec round trip on held-out frames: {f"{quality:.2f} dB PSNR" if quality else "not measured"}

## Controls

{controls}
{axes}

Made with `python -m train`; settings, seed and data hash are in `config.json` under provenance.
"""


def export_run(stage: FlowMatching, progress: Progress) -> Path:
    """Write ``<run>/export`` from the weights that `stage.model` holds now (the loop puts the averaged ones there)."""
    config, data, codec = stage.context.config, stage.recorded.frames, stage.recorded.trained
    height, width = data.size
    codec_info = {"digest": codec.digest, **{k: v for k, v in codec.info.items() if k != "digest"}}
    view = config.data.place_view if stage.data.place else codec.config.place_view
    world = WorldConfig(
        name=config.data.world,
        title=config.data.title,
        height=height,
        width=width,
        fps=data.fps,
        model=stage.model_config,
        codec=dataclasses.replace(codec.config, place=stage.data.place, place_view=view),
        sampler=stage.sampler(),
        actions=data.spec,
        provenance=provenance(config, data, progress, codec_info),
    )
    folder = stage.context.folder / "export"
    spawns = pick_spawns(data, world.sampler.window)
    export_world(folder, world, stage.model.state_dict(), codec.codec.state_dict(), spawns, card(world))
    return folder

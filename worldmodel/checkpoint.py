"""A published world on disk <-> live objects: safetensors, JSON, PNG and hashes. No pickle, no code from a world.

A world folder holds config.json, model.safetensors, codec.safetensors, spawns/NNN/{frames.png, actions.json, thumb.png}, README.md
and SHA256SUMS. Shapes: T frames, H W pixels, A action.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from worldmodel.config import WorldConfig
from worldmodel.errors import CheckpointError
from worldmodel.models.codec import FrameCodec
from worldmodel.models.dit import DiT
from worldmodel.sums import SUMS, sums_of, weights_id
from worldmodel.sums import verify as verify_sums

FORMAT = "worldmodel-1"
MOST_ACTION = 1e4  # encoded actions are about 1


@dataclass(frozen=True)
class Spawn:
    """A place to start: the last T real frames before play, uint8 (T,H,W,3), and the actions float32 (T,A) that led to them."""

    frames: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True)
class LoadedWorld:
    """What a world folder holds, checked but not yet placed on a device. weights_hash: short id of model and codec weights."""

    config: WorldConfig
    model_state: dict[str, Tensor]
    codec_state: dict[str, Tensor]
    spawns: tuple[Spawn, ...]
    weights_hash: str

    def build(self) -> tuple[DiT, FrameCodec]:
        """Fresh networks with these weights, in float32 on the CPU. Raises CheckpointError if the weights do not fit the config."""
        model = _filled(lambda: DiT(self.config.model), self.model_state, "model.safetensors")
        codec = _filled(lambda: FrameCodec(self.config.codec), self.codec_state, "codec.safetensors")
        return model.eval(), codec.eval()


M = TypeVar("M", bound=nn.Module)


def _filled(make: Callable[[], M], state: Mapping[str, Tensor], file: str) -> M:
    with torch.device("meta"):  # shapes only: a config that asks for more memory than there is must not get it
        module = make()
    check_state(module.state_dict(), state, file)
    module.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
    return module


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], file: str) -> None:
    """Raise CheckpointError unless `state` has the names and shapes of `own`; file: what to call it."""
    missing, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or surplus:
        what = f"lacks {', '.join(missing[:4])}" if missing else f"has the unknown {', '.join(surplus[:4])}"
        raise CheckpointError(f"{file} does not fit config.json: it {what}; export or download the world again")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{file} does not fit config.json: {name} is {tuple(tensor.shape)}, the config asks for {tuple(own[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file} is damaged: {name} holds {tensor.dtype}, not floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file} is damaged: {name} holds values that are not finite; export or download the world again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the world folder is incomplete, export or download it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no iteration
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}): export or download the world again") from error


def _read_spawn(folder: Path, config: WorldConfig) -> Spawn:
    try:
        with Image.open(folder / "frames.png") as image:
            strip = np.asarray(image.convert("RGB"))
        actions = np.array(json.loads((folder / "actions.json").read_text()), dtype=np.float32)
    except (OSError, ValueError, TypeError, RecursionError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"spawn {folder} cannot be read ({error}): export or download the world again") from error
    height, width = config.height, config.width
    if strip.shape[1] != width or strip.shape[0] % height or not len(strip):
        raise CheckpointError(
            f"spawn {folder}: frames.png is {strip.shape[1]}x{strip.shape[0]}, not a column of {width}x{height} frames"
        )
    frames = strip.reshape(-1, height, width, 3)
    needed = (len(frames), config.actions.width)
    if actions.shape != needed:
        raise CheckpointError(f"spawn {folder}: actions.json has shape {actions.shape}, {len(frames)} frames need {needed}")
    if not np.isfinite(actions).all() or np.abs(actions).max() > MOST_ACTION:
        raise CheckpointError(f"spawn {folder}: actions.json holds a number that is no action; export or download the world again")
    return Spawn(frames, actions)


def load_world(folder: Path, verify: bool = True) -> LoadedWorld:
    """Read and check a world folder. Raises ConfigError or CheckpointError: missing, damaged, cut off, wrong version or shapes."""
    folder = Path(folder)
    config = WorldConfig.load(folder)
    hashes = verify_sums(folder) if verify else {}
    model_state, codec_state = read_tensors(folder / "model.safetensors"), read_tensors(folder / "codec.safetensors")
    spawns = tuple(_read_spawn(path, config) for path in sorted((folder / "spawns").glob("[0-9]*")))
    if not spawns:
        raise CheckpointError(f"{folder} has no spawns/NNN: there is no place to start, export or download the world again")
    return LoadedWorld(config, model_state, codec_state, spawns, weights_id(folder, hashes))


def export_world(
    folder: Path,
    config: WorldConfig,
    model_state: Mapping[str, Tensor],
    codec_state: Mapping[str, Tensor],
    spawns: Sequence[Spawn],
    card: str,
    dtype: torch.dtype = torch.bfloat16,
    extras: Mapping[str, bytes] | None = None,
) -> None:
    """Write a world folder, whole or not at all: built beside `folder`, then put in its place. Weights are stored in `dtype`.

    extras: further files by name, such as ``demo.jsonl`` (actions played while nobody touches the controls).

    Raises CheckpointError if there is no spawn or the disk refuses.
    """
    if not spawns:
        raise CheckpointError("a world needs at least one spawn")
    with written_whole(folder) as fresh:
        (fresh / "spawns").mkdir()
        (fresh / "config.json").write_text(config.to_json(), encoding="utf-8")
        (fresh / "README.md").write_text(card, encoding="utf-8")
        _write_tensors(fresh / "model.safetensors", model_state, dtype)
        _write_tensors(fresh / "codec.safetensors", codec_state, dtype)
        for name, content in (extras or {}).items():
            (fresh / name).write_bytes(content)
        for i, spawn in enumerate(spawns):
            _write_spawn(fresh / "spawns" / f"{i:03d}", spawn)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`: at the end it gets its SHA256SUMS, is synced and put in the place of what was there.

    If anything fails before, `folder` is as it was. Raises CheckpointError where the disk refuses.
    """
    folder = Path(folder)
    fresh, old = folder.with_name(folder.name + ".new.tmp"), folder.with_name(folder.name + ".old.tmp")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        (fresh / SUMS).write_text(sums_of(fresh), encoding="utf-8")
        for path in (p for p in sorted(fresh.rglob("*")) if p.is_file()):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"the world could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_tensors(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    # vectors (norms, biases, the latent scale) stay float32: they are small and set the scale of everything else
    tensors = {k: v.detach().to("cpu", dtype if v.ndim > 1 else torch.float32).contiguous() for k, v in state.items()}
    count = sum(t.numel() for t in tensors.values())
    facts = {"format": FORMAT, "parameters": count, "dtype": str(dtype).removeprefix("torch.")}
    try:  # one entry only: safetensors writes several in random order, and the same world should be the same file
        save_file(tensors, path, metadata={"worldmodel": json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors makes it private


def _write_spawn(folder: Path, spawn: Spawn) -> None:
    folder.mkdir()
    Image.fromarray(spawn.frames.reshape(-1, *spawn.frames.shape[2:])).save(folder / "frames.png", optimize=True)
    Image.fromarray(spawn.frames[-1]).save(folder / "thumb.png", optimize=True)
    (folder / "actions.json").write_text(json.dumps(np.round(spawn.actions.astype(float), 6).tolist()), encoding="utf-8")


if __name__ == "__main__":
    from worldmodel.cli import main

    sys.exit(main())
